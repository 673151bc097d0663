package clientapi

import (
	"fmt"
	"net/http"
	"net/netip"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

func TestLimiter(t *testing.T) {
	l := newLimiter[string](RateLimit{Threshold: 4, Cooloff: time.Second}, 2)
	now := time.Unix(1_700_000_000, 0)
	for range 4 {
		require.Zero(t, l.wait("a", now))
	}
	require.Equal(t, 250*time.Millisecond, l.wait("a", now))
	require.Equal(t, 250*time.Millisecond, l.wait("a", now), "who is refused does not wait longer for it")
	require.Zero(t, l.wait("b", now), "somebody else")
	require.Zero(t, l.wait("a", now.Add(250*time.Millisecond)))
	require.NotZero(t, l.wait("a", now.Add(250*time.Millisecond)))
	for range 4 {
		require.Zero(t, l.wait("a", now.Add(time.Hour)))
	}
	require.NotZero(t, l.wait("a", now.Add(time.Hour)), "no more than the threshold at once")
	for i := range 100 {
		l.wait(string(rune(i)), now)
	}
	require.Equal(t, 2, l.buckets.Len(), "memory is bounded")
}

// Requests take the time before they come to the bucket, and need not come in that order.
func TestLimiterOfRequestsOutOfOrder(t *testing.T) {
	l := newLimiter[string](RateLimit{Threshold: 10, Cooloff: time.Second}, 1)
	now, allowed := time.Unix(1_700_000_000, 0), 0
	for i := range 1001 {
		early, late := now.Add(time.Duration(i)*time.Millisecond), now.Add(time.Duration(i+50)*time.Millisecond)
		for _, at := range []time.Time{late, early, late, early} {
			if l.wait("a", at) == 0 {
				allowed++
			}
		}
	}
	require.Equal(t, 20, allowed, "10 at once, and 10 in the second that passes")
}

// Who comes from ever new addresses, as clients of IPv6 can, or with ever new tokens, makes the server remember no more of
// them than were remembered before.
func TestMemoryIsBounded(t *testing.T) {
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	one := RateLimit{Threshold: 1, Cooloff: time.Hour}
	l, now := newLimits(RateLimiting{Enabled: true, Token: one, UnknownToken: one}), time.Now()
	req, next := &http.Request{}, 0
	guess := func(n int) {
		for range n {
			next++
			req.RemoteAddr = fmt.Sprintf("[2001:db8:%x:%x::1]:1", next>>16, next&0xffff)
			require.Zero(t, l.wait(req, expiration.HashToken(strconv.Itoa(next)), next%2 == 0, now))
		}
	}
	empty := heap()
	guess(rememberedTokens * 2)
	full := heap()
	guess(rememberedTokens * 2)
	require.Less(t, heap()-full, (full-empty)/10)
	require.Less(t, full-empty, int64(64<<20))
	runtime.KeepAlive(l)
}

func TestKnownTokensAreNotLimitedByAddress(t *testing.T) {
	one := RateLimit{Threshold: 1, Cooloff: time.Hour}
	l := newLimits(RateLimiting{Enabled: true, Token: one, UnknownToken: one})
	req, now := &http.Request{RemoteAddr: "192.0.2.1:1"}, time.Now()
	require.Zero(t, l.wait(req, expiration.HashToken("guess"), false, now))
	require.NotZero(t, l.wait(req, expiration.HashToken("another guess"), false, now))
	require.Zero(t, l.wait(req, expiration.HashToken("valid"), true, now))
	require.NotZero(t, l.wait(req, expiration.HashToken("valid"), true, now))
	require.Zero(t, l.wait(req, expiration.HashToken("another"), true, now))
	require.Zero(t, newLimits(RateLimiting{}).wait(req, expiration.HashToken("x"), false, now), "switched off")
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
