package clientapi

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Actions and keep-alives have the same size limit for their bodies, and the same answer to a body that is too large.
func TestBodiesAreBounded(t *testing.T) {
	_, routed, _ := newEndpoint(func() error { return nil })
	for _, request := range []struct{ method, path, member string }{
		{"PUT", "/_matrix/client/v3/expiration/refresh", fmt.Sprintf("%q:%q", tokenKey, knownToken)},
		{"PUT", "/_matrix/client/v3/expiration/delegate", fmt.Sprintf("%q:%q", tokenKey, knownToken)},
		{"POST", "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/x", `"action":"no such action"`},
	} {
		for size, want := range map[int]int{maxKeepAliveSize: 0, maxKeepAliveSize + 1: http.StatusRequestEntityTooLarge} {
			body := fmt.Sprintf("{%s%s}", request.member, strings.Repeat(" ", size-2-len(request.member)))
			w := httptest.NewRecorder()
			routed.ServeHTTP(w, httptest.NewRequest(request.method, request.path, strings.NewReader(body)))
			if want == 0 {
				require.NotEqual(t, http.StatusRequestEntityTooLarge, w.Code, request.path)
				continue
			}
			require.Equal(t, want, w.Code, request.path)
			require.JSONEq(t, `{"errcode":"M_TOO_LARGE","error":"The body must be at most 4096 bytes"}`, w.Body.String())
		}
	}
}
