package clientapi

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

// Who comes from ever new addresses, as clients of IPv6 can, makes the server remember no more of them than were remembered before.
func TestMemoryIsBounded(t *testing.T) {
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	g, now := newGuesses(once, ""), time.Now()
	req, next := &http.Request{}, 0
	guess := func(n int) {
		for range n {
			next++
			req.RemoteAddr = fmt.Sprintf("[2001:db8:%x:%x::1]:1", next>>16, next&0xffff)
			require.Zero(t, g.wait(req, now))
		}
	}
	empty := heap()
	guess(rememberedAddresses * 2)
	full := heap()
	guess(rememberedAddresses * 2)
	require.Less(t, heap()-full, (full-empty)/10)
	require.Less(t, full-empty, int64(16<<20))
	runtime.KeepAlive(g)
}

func TestKnownTokensAreNotLimitedByAddress(t *testing.T) {
	g := newGuesses(once, "")
	req := &http.Request{RemoteAddr: "192.0.2.1:1"}
	require.NoError(t, g.mayAsk(req, false, 0))
	var limited *rateError
	require.ErrorAs(t, g.mayAsk(req, false, 0), &limited)
	require.InDelta(t, time.Hour, limited.retryAfter, float64(time.Minute))
	require.NoError(t, g.mayAsk(req, true, 0))
	require.ErrorAs(t, g.mayAsk(req, true, time.Second), &limited)
	require.Equal(t, time.Second, limited.retryAfter)
	require.NoError(t, g.mayAsk(&http.Request{RemoteAddr: "192.0.2.2:1"}, false, 0), "somebody else")
	off := newGuesses(expiration.RateLimit{}, "")
	for range 2 {
		require.NoError(t, off.mayAsk(req, false, 0), "switched off")
	}
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
		got := clientNetwork(req, test.header)
		require.Equal(t, test.want, got.String(), test)
		require.IsType(t, netip.Prefix{}, got)
	}
}
