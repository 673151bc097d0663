//go:build all

package integration

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// The limit of requests with unknown tokens, for each address.

// Guesses come from many addresses. Each address is limited on its own.
func testGuesses(t *testing.T, s *server) {
	const addresses, guesses = 300, 40
	var notFound, limited atomic.Int64
	work := make(chan int, addresses)
	for i := range addresses {
		work <- i
	}
	close(work)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for i := range work {
				if err := s.guess(t.Context(), 1000+i, guesses, &notFound, &limited); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, addresses*guesses, notFound.Load()+limited.Load())
	// Each address may make 20 requests at once, and 20 more in each second after that.
	require.GreaterOrEqual(t, notFound.Load(), int64(addresses*20), "one address pays for another")
	t.Logf("of %d guesses from each of %d addresses %.1f were looked up", guesses, addresses, float64(notFound.Load())/addresses)

	// One address gets no more guesses by more requests, more connections, or headers that claim other addresses. The server trusts only the
	// header that the operator has configured.
	var forged []string
	for i := range 50 {
		for _, header := range []string{
			"X-Forwarded-For: 192.0.2.%d", "X-Real-IP: 192.0.2.%d", "Forwarded: for=192.0.2.%d", "True-Client-IP: 192.0.2.%d",
			"CF-Connecting-IP: 192.0.2.%d", "X-Client-IP: 192.0.2.%d", "x-forwarded-for: 192.0.2.%d, 127.0.0.1", "Via: 1.1 192.0.2.%d",
		} {
			forged = append(forged, fmt.Sprintf(header, i))
		}
	}
	notFound.Store(0)
	limited.Store(0)
	began := time.Now()
	for range 16 {
		wg.Go(func() {
			if err := s.guess(t.Context(), 999, 100, &notFound, &limited, forged...); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	allowed := 20 + 20*time.Since(began).Seconds() + 1
	require.LessOrEqual(t, float64(notFound.Load()), allowed, "more guesses than the limit allows")
	require.EqualValues(t, 1600, notFound.Load()+limited.Load())
}

// guess sends n different tokens over one connection, all at once, and counts the answers.
func (s *server) guess(ctx context.Context, number, n int, notFound, limited *atomic.Int64, header ...string) error {
	c, err := s.stranger(ctx, number)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(hangUp))
	var requests bytes.Buffer
	for i := range n {
		body := fmt.Sprintf(`{"expire_refresh_token":"%043d"}`, number*1000+i)
		requests.WriteString(keepAliveHead)
		if len(header) > 0 {
			fmt.Fprintf(&requests, "%s\r\n", header[i%len(header)])
		}
		fmt.Fprintf(&requests, "Content-Length: %d\r\n\r\n%s", len(body), body)
	}
	if _, err = c.Write(requests.Bytes()); err != nil {
		return err
	}
	for range n {
		switch code, errcode, err := c.code(); {
		case err != nil:
			return err
		case code == http.StatusNotFound && errcode == "M_NOT_FOUND":
			notFound.Add(1)
		case code == http.StatusTooManyRequests && errcode == "M_LIMIT_EXCEEDED":
			limited.Add(1)
		default:
			return fmt.Errorf("a guess is answered with %d %s", code, errcode)
		}
	}
	return nil
}

// If the operator trusts a header, the client's address is the last entry of the header, which the proxy has written. The client controls
// only the entries before it, so it cannot choose its address.
func TestRealIPHeader(t *testing.T) {
	s := start(t, homeserver.Config{Expiration: JSON{"rate_limiting": JSON{
		"real_ip_header": "X-Forwarded-For", "unknown_token": JSON{"threshold": 1, "cooloff_ms": 3600000},
	}}})
	allowed, refused := http.StatusNotFound, http.StatusTooManyRequests
	for _, test := range []struct {
		header string
		code   int
	}{
		{"X-Forwarded-For: 192.0.2.1", allowed},
		{"X-Forwarded-For: 192.0.2.1", refused},
		{"X-Forwarded-For: 192.0.2.2", allowed},
		{"X-Forwarded-For: 192.0.2.3, 192.0.2.1", refused}, // only the last entry is the proxy's
		{"X-Forwarded-For: 192.0.2.3\r\nX-Forwarded-For: 192.0.2.1", refused},
		{"x-forwarded-for: 192.0.2.3,192.0.2.4\r\nX-FORWARDED-FOR:   192.0.2.1  ", refused},
		{"X-Real-IP: 192.0.2.5\r\nForwarded: for=192.0.2.5\r\nX-Forwarded-For: 192.0.2.1", refused},
		{"X-Forwarded-For: ::ffff:192.0.2.1", refused}, // the same address in IPv6
		{"X-Forwarded-For: 2001:db8::1", allowed},
		{"X-Forwarded-For: 2001:db8::2", refused}, // a client may have a whole /64
		{"X-Forwarded-For: 2001:db8:0:1::1", allowed},
		{"X-Forwarded-For: nonsense", allowed}, // all clients without a valid address share one limit
		{"X-Forwarded-For: other nonsense", refused},
		{"X-Forwarded-For: 192.0.2.6,", refused},
		{"X-Other: 1", allowed}, // without the header the address of the connection counts
		{"X-Real-IP: 192.0.2.7", refused},
	} {
		var notFound, limited atomic.Int64
		require.NoError(t, s.guess(t.Context(), 1, 1, &notFound, &limited, test.header))
		require.Equal(t, test.code == allowed, notFound.Load() == 1, test.header)
	}
}
