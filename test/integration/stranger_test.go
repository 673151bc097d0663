//go:build all

package integration

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// stranger is a connection on which the test writes HTTP by hand.
type stranger struct {
	net.Conn
	in *bufio.Reader
}

// stranger opens a connection. Loopback has many addresses, and each number gets an address of its own.
func (s *server) stranger(ctx context.Context, number int) (*stranger, error) {
	dialer := net.Dialer{
		Timeout:   soon,
		LocalAddr: &net.TCPAddr{IP: net.IPv4(127, byte(1+number>>16), byte(number>>8), byte(number))},
	}
	conn, err := dialer.DialContext(ctx, "tcp", strings.TrimPrefix(s.URL, "http://"))
	if err != nil {
		return nil, err
	}
	return &stranger{conn, bufio.NewReader(conn)}, nil
}

// code reads an answer and returns its status and error code.
func (s *stranger) code() (int, string, error) {
	res, err := http.ReadResponse(s.in, nil)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	var body struct {
		ErrCode string `json:"errcode"`
	}
	if err = json.NewDecoder(res.Body).Decode(&body); err != nil && !errors.Is(err, io.EOF) {
		return 0, "", err
	}
	_, err = io.Copy(io.Discard, res.Body)
	return res.StatusCode, body.ErrCode, err
}

// awaitHangUp reads until the server closes the connection. It returns the status line of the answer, or "".
func (s *stranger) awaitHangUp() (string, error) {
	if err := s.SetReadDeadline(time.Now().Add(hangUp)); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(s.in)
	status, _, _ := strings.Cut(string(answer), "\r\n")
	if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
		return status, errors.New("the server does not hang up")
	}
	return status, nil // the server has sent an answer or reset the connection
}

// trickle writes a byte from time to time, until the server closes the connection.
func (s *stranger) trickle(ctx context.Context, data string) {
	pause := time.NewTicker(300 * time.Millisecond)
	defer pause.Stop()
	for {
		for i := range len(data) {
			if _, err := io.WriteString(s, data[i:i+1]); err != nil {
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-pause.C:
			}
		}
	}
}

// A request about delayed events whose body does not arrive in time is given up, wherever the body stops. A send with a delay in its query
// is one of Dendrite's requests, which have no time limit.
func TestSlowBodiesOfDelayedEvents(t *testing.T) {
	t.Parallel()
	const scheduling, acting = 30 * time.Second, 10 * time.Second // docs/delayed-events.md, "Limits"
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		alice := s.newUser(t)
		roomID := s.room(t, alice)
		id, other := alice.delayMessage(t, roomID, time.Hour, "kept"), alice.delayMessage(t, roomID, time.Hour, "sent")
		var wg sync.WaitGroup
		number := 0
		for _, test := range []struct {
			method, path string
			wait         time.Duration
			code         int
			errcode      string
		}{
			{http.MethodPut, dedicatedPath(stableRooms, roomID, "m.x"), scheduling, 400, "M_NOT_JSON"},
			{http.MethodPut, dedicatedPath(unstableRooms, roomID, "m.x"), scheduling, 400, "M_NOT_JSON"},
			{http.MethodPost, unstableDelayed + "/" + id, acting, 400, "M_NOT_JSON"},
			// These need no body, so they act before it arrives.
			{http.MethodPost, unstableDelayed + "/" + other + "/send", acting, 200, ""},
			{http.MethodPost, stableDelayed + "/" + other + "/send", acting, 200, ""},
		} {
			for what, trickled := range map[string]string{"nothing more": "", "a byte from time to time": " "} {
				number++
				c, err := s.stranger(t.Context(), number)
				require.NoError(t, err)
				began := time.Now()
				_, err = fmt.Fprintf(c, "%s %s HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\nContent-Length: 4000\r\n\r\n{",
					test.method, test.path, alice.Token)
				require.NoError(t, err)
				if trickled != "" {
					wg.Go(func() { c.trickle(t.Context(), trickled) })
				}
				wg.Go(func() {
					defer c.Close()
					_ = c.SetReadDeadline(began.Add(test.wait + patience.For(15*time.Second)))
					code, errcode, err := c.code()
					took := time.Since(began)
					if err == nil {
						_, err = c.awaitHangUp()
					}
					if err != nil || code != test.code || errcode != test.errcode || took < test.wait-time.Second {
						t.Errorf("%s, then %s: HTTP %d %s, %v, after %s", test.path, what, code, errcode, err, took)
					}
				})
			}
		}
		require.NotEmpty(t, alice.finalised(t, other).Get("event_id").Str)
		wg.Wait()
		require.Equal(t, []string{id}, alice.scheduled(t))
	})
}
