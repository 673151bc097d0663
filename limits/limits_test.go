package limits

import (
	"fmt"
	"net/http"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

var once = expiration.RateLimit{Threshold: 1, Cooloff: time.Hour}

// A client that always uses new addresses, as is possible with IPv6, does not make the Limiter use more memory than its bound.
func TestMemoryIsBounded(t *testing.T) {
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	g, now := New[netip.Prefix](once), time.Now()
	req, next := &http.Request{}, 0
	guess := func(n int) {
		for range n {
			next++
			req.RemoteAddr = fmt.Sprintf("[2001:db8:%x:%x::1]:1", next>>16, next&0xffff)
			require.Zero(t, g.Wait(ClientNetwork(req, ""), now))
		}
	}
	empty := heap()
	guess(remembered * 2)
	full := heap()
	guess(remembered * 2)
	require.Less(t, heap()-full, (full-empty)/10)
	require.Less(t, full-empty, int64(16<<20))
	runtime.KeepAlive(g)
}

func TestClientNetwork(t *testing.T) {
	for _, test := range []struct{ remote, header, value, want string }{
		{"192.0.2.1:1234", "", "", "192.0.2.1/32"},
		{"[2001:db8:1:2:3::4]:1", "", "", "2001:db8:1:2::/64"},
		{"[::ffff:192.0.2.1]:1", "", "", "192.0.2.1/32"},
		{"[fe80::1%eth0]:1", "", "", "fe80::/64"},
		{"192.0.2.1:1234", "", "203.0.113.9", "192.0.2.1/32"},
		{"192.0.2.1:1234", "X-Forwarded-For", "203.0.113.9", "203.0.113.9/32"},
		{"192.0.2.1:1234", "X-Forwarded-For", "10.1.1.1, 203.0.113.9", "203.0.113.9/32"},
		{"192.0.2.1:1234", "X-Forwarded-For", "", "192.0.2.1/32"},
		{"@", "", "", "invalid Prefix"},
		{"192.0.2.1:1234", "X-Forwarded-For", "nonsense", "invalid Prefix"},
	} {
		req := &http.Request{RemoteAddr: test.remote, Header: http.Header{}}
		if test.value != "" {
			req.Header.Add("X-Forwarded-For", "198.51.100.1")
			req.Header.Add("X-Forwarded-For", test.value)
		}
		got := ClientNetwork(req, test.header)
		require.Equal(t, test.want, got.String(), test)
		require.IsType(t, netip.Prefix{}, got)
	}
}
