package dendritefix

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/gorilla/mux"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"
)

func TestRefuseNUL(t *testing.T) {
	router := mux.NewRouter().UseEncodedPath()
	router.Use(RefuseNUL)
	served := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	router.Handle("/send/{txnID}", served)
	router.Handle("/redact/{eventID}/{txnId}", served)
	router.Handle("/other/{eventID}", served)
	for path, code := range map[string]int{
		"/send/txn": 200, "/send/%2500": 200, "/send/%00": 400, "/send/a%00b": 400, "/redact/$x/%00": 400, "/redact/$x/%ff": 200,
		"/other/%00": 200,
	} {
		w := httptest.NewRecorder()
		router.ServeHTTP(w, httptest.NewRequest(http.MethodPut, path, nil))
		require.Equal(t, code, w.Code, path)
		if code != http.StatusOK {
			require.Equal(t, "M_INVALID_PARAM", gjson.Get(w.Body.String(), "errcode").Str)
			require.Equal(t, "*", w.Header().Get("Access-Control-Allow-Origin"))
		}
	}
}

func TestUnstorable(t *testing.T) {
	for content, want := range map[string]bool{
		`{}`:                        false,
		`{"body":"\u0000"}`:         false,
		`{"redacts":"$x\u0000"}`:    true,
		`{"Redacts":"\u0000"}`:      true,
		`{"redacts":["\u0000"]}`:    false,
		`{"redacts":"\\u0000"}`:     false,
		`{"m.relates_to":"\u0000"}`: false,
		`{"m.relates_to":{"x":"\u0000","event_id":"$x","rel_type":"m.thread"}}`:   false,
		`{"m.relates_to":{"event_id":"\u0000","rel_type":"m.thread"}}`:            true,
		`{"m.relates_to":{"event_id":"$x","rel_type":"m.\u0000"}}`:                true,
		`{"\u006d.relates_to":{"event_id":"$x","rel_type":"m.\u0000"}}`:           true,
		`{"m.relates_to":{"event_id":"$x"},"M.RELATES_TO":{"rel_type":"\u0000"}}`: true,
	} {
		require.Equal(t, want, Unstorable([]byte(content)), content)
	}
}
