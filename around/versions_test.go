package around

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"
)

// The middleware changes Dendrite's answer of one path, and nothing else: other paths, other methods and failures are Dendrite's own.
func TestVersions(t *testing.T) {
	for _, code := range []int{http.StatusOK, http.StatusTooManyRequests} {
		root := mux.NewRouter()
		router := root.PathPrefix(httputil.PublicClientPathPrefix).Subrouter()
		router.Use(Versions("a", "b"))
		answer := func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			_, _ = w.Write([]byte(`{"versions":["v1.1"],"unstable_features":{"c":false}}`))
		}
		router.HandleFunc("/versions", answer)
		router.HandleFunc("/v3/versions", answer)
		get := func(method, path string) (int, gjson.Result) {
			w := httptest.NewRecorder()
			root.ServeHTTP(w, httptest.NewRequest(method, path, nil))
			return w.Code, gjson.Get(w.Body.String(), "unstable_features")
		}
		got, features := get(http.MethodGet, "/_matrix/client/versions")
		require.Equal(t, code, got)
		if code == http.StatusOK {
			require.JSONEq(t, `{"a":true,"b":true,"c":false}`, features.Raw)
		} else {
			require.JSONEq(t, `{"c":false}`, features.Raw)
		}
		_, features = get(http.MethodGet, "/_matrix/client/v3/versions")
		require.JSONEq(t, `{"c":false}`, features.Raw)
		_, features = get(http.MethodPost, "/_matrix/client/versions")
		require.JSONEq(t, `{"c":false}`, features.Raw)
	}
}
