package clientapi

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Actions and keep-alives have the same size limit for their bodies, and the same answer to a body that is too large.
func TestBodiesAreBounded(t *testing.T) {
	_, routed, _ := newEndpoint(func() error { return nil })
	for _, request := range []struct{ method, path, member string }{
		{"PUT", "/_matrix/client/v3/expiration/refresh", fmt.Sprintf("%q:%q", tokenKey, knownToken)},
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

// A body that does not arrive in time is given up. The deadline does not cancel a request whose body has arrived, is not read, or does
// not exist.
func TestDeadlineOfABody(t *testing.T) {
	const wait = 100 * time.Millisecond
	server := httptest.NewServer(bounded(10, wait, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path == "/read" {
			if _, err := readBody(req.Body); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
		}
		select {
		case <-req.Context().Done():
			http.Error(w, "cancelled", http.StatusInternalServerError)
		case <-time.After(3 * wait):
		}
	})))
	defer server.Close()
	for request, want := range map[string]int{
		"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}":   http.StatusOK,
		"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n":     http.StatusOK,
		"POST /unread HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}": http.StatusOK,
		"POST /unread HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n":   http.StatusOK,
		"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{":    http.StatusBadRequest,
	} {
		t.Run(request, func(t *testing.T) {
			conn, err := net.Dial("tcp", server.Listener.Addr().String())
			require.NoError(t, err)
			defer conn.Close()
			_, err = conn.Write([]byte(request))
			require.NoError(t, err)
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			require.NoError(t, err)
			defer res.Body.Close()
			require.Equal(t, want, res.StatusCode)
		})
	}
}
