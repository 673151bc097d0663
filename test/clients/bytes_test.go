//go:build all

package clients

import (
	"bufio"
	"compress/gzip"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// write writes a request to the server as it is, and returns the answer. It replaces HOST in the request by the server's address. Lines end
// with \n here, and with \r\n on the connection.
func write(t *testing.T, server *homeserver.Server, request string) homeserver.Response {
	t.Helper()
	res, err := exchange(server, request)
	require.NoError(t, err)
	return res
}

// exchange is write for other goroutines than the test's.
func exchange(server *homeserver.Server, request string) (homeserver.Response, error) {
	host := strings.TrimPrefix(server.URL, "http://")
	conn, err := net.DialTimeout("tcp", host, soon)
	if err != nil {
		return homeserver.Response{}, err
	}
	defer conn.Close()
	if err = conn.SetDeadline(time.Now().Add(soon)); err != nil {
		return homeserver.Response{}, err
	}
	if _, err = strings.NewReplacer("HOST", host, "\n", "\r\n").WriteString(conn, request); err != nil {
		return homeserver.Response{}, err
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return homeserver.Response{}, err
	}
	defer res.Body.Close()
	body := io.Reader(res.Body)
	if res.Header.Get("Content-Encoding") == "gzip" {
		if body, err = gzip.NewReader(body); err != nil {
			return homeserver.Response{}, err
		}
	}
	data, err := io.ReadAll(body)
	return homeserver.Response{Code: res.StatusCode, Header: res.Header, Body: data}, err
}

// answers requires that an answer is 200 {}.
func answers(t *testing.T, res homeserver.Response) {
	t.Helper()
	require.Equal(t, "200 {}", fmt.Sprint(res.Code, " ", strings.TrimSpace(string(res.Body))))
}

// refuses requires that an answer is an error.
func refuses(t *testing.T, res homeserver.Response, code int, errcode string) {
	t.Helper()
	require.Equal(t, fmt.Sprint(code, " ", errcode), fmt.Sprint(res.Code, " ", res.Get("errcode").Str), res)
}

// later schedules an event of a user as matrix-js-sdk does, and returns its delay ID.
func later(t *testing.T, user *homeserver.Client, roomID, stateKey, text string) string {
	t.Helper()
	res := do(t, user, http.MethodPut, homeserver.StatePath(roomID, memberType, stateKey)+"?org.matrix.msc4140.delay=3600000",
		homeserver.JSON{"text": text})
	return res.Get("delay_id").Str
}

// textOf returns what later has scheduled, if it is in the room.
func textOf(t *testing.T, user *homeserver.Client, roomID, stateKey string) string {
	t.Helper()
	res, err := user.Do(t.Context(), http.MethodGet, homeserver.StatePath(roomID, memberType, stateKey), nil)
	require.NoError(t, err)
	return res.Get("text").Str
}
