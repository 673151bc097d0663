package webapi

import (
	"bufio"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A body that does not arrive in time is given up. The deadline does not cancel a request whose body has arrived, is not read, or does
// not exist.
func TestDeadlineOfABody(t *testing.T) {
	const wait = 100 * time.Millisecond
	server := httptest.NewServer(Bounded(10, wait, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path == "/read" {
			if _, err := ReadBody(req.Body); err != nil {
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
