package dendritefix

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"
)

// A /sync that is cancelled before its answer begins is not answered with 200. All other answers stay as they are.
func TestUnfinishedSync(t *testing.T) {
	for name, test := range map[string]struct {
		path      string
		code      int // 0: the answer begins with its body
		cancelled bool
		want      int
	}{
		"cancelled":              {"/_matrix/client/v3/sync", http.StatusOK, true, http.StatusServiceUnavailable},
		"cancelled, no header":   {"/_matrix/client/r0/sync", 0, true, http.StatusServiceUnavailable},
		"finished":               {"/_matrix/client/v3/sync", http.StatusOK, false, http.StatusOK},
		"finished, no header":    {"/_matrix/client/v3/sync", 0, false, http.StatusOK},
		"cancelled, with errors": {"/_matrix/client/v3/sync", http.StatusUnauthorized, true, http.StatusUnauthorized},
		"another request":        {"/_matrix/client/v3/publicRooms", http.StatusOK, true, http.StatusOK},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			handler := RefuseUnfinishedSync(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				if test.cancelled {
					cancel()
				}
				w.Header().Set("Content-Length", "2")
				if test.code != 0 {
					w.WriteHeader(test.code)
				}
				_, err := io.WriteString(w, "{}")
				require.NoError(t, err)
			}))
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, httptest.NewRequestWithContext(ctx, http.MethodGet, test.path, nil))
			require.Equal(t, test.want, w.Code)
			if test.want == http.StatusServiceUnavailable {
				require.JSONEq(t, `{"errcode":"M_UNKNOWN","error":"The server is stopping"}`, w.Body.String())
				require.Empty(t, w.Header().Get("Content-Length"))
				require.Equal(t, "application/json", w.Header().Get("Content-Type"))
			} else {
				require.Equal(t, "{}", w.Body.String())
			}
		})
	}
}
