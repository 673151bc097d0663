package clientapi

import (
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// RateLimit allows Threshold requests at once, and as many again in each Cooloff.
type RateLimit struct {
	Threshold int
	Cooloff   time.Duration
}

// RateLimiting limits the keep-alive endpoint (contract, section 2).
type RateLimiting struct {
	Enabled bool
	// Token limits the keep-alives for one valid token.
	Token RateLimit
	// UnknownToken limits the requests with unknown tokens from one address. Valid tokens are never limited by address.
	UnknownToken RateLimit
	// RealIPHeader is the header in which a trusted reverse proxy names the client's address, or "" if there is none.
	RealIPHeader string
}

// How many tokens and addresses are remembered. Who is forgotten starts afresh, which costs more requests than it gains.
const (
	rememberedTokens    = 1 << 16
	rememberedAddresses = 1 << 14
)

// limiter is a token bucket for each key, for a bounded number of keys. However many requests come at once, and in whatever
// order their times are, no more are allowed than the limit says, and those that are refused cost nothing.
type limiter[K comparable] struct {
	buckets *lru.Cache[K, *bucket]
	// interval is how long it takes until one more request is allowed, cooloff until an empty bucket is full.
	interval, cooloff time.Duration
}

// bucket is what is remembered of a key.
type bucket struct {
	mu   sync.Mutex
	full time.Time // when the bucket is full again
}

func newLimiter[K comparable](l RateLimit, remembered int) *limiter[K] {
	buckets, err := lru.New[K, *bucket](remembered)
	if err != nil {
		panic(err) // only for a size below 1
	}
	return &limiter[K]{buckets: buckets, interval: l.Cooloff / time.Duration(l.Threshold), cooloff: l.Cooloff}
}

// wait returns 0 if a request is allowed now, and else after how long one will be.
func (l *limiter[K]) wait(key K, now time.Time) time.Duration {
	b, ok := l.buckets.Get(key)
	if !ok {
		b = &bucket{}
		if earlier, ok, _ := l.buckets.PeekOrAdd(key, b); ok {
			b = earlier
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	full := now.Add(l.interval)
	if b.full.After(now) {
		full = b.full.Add(l.interval)
	}
	if wait := full.Sub(now) - l.cooloff; wait > 0 {
		return wait
	}
	b.full = full
	return 0
}

// limits are the limiters of the keep-alive endpoint.
type limits struct {
	cfg       RateLimiting
	tokens    *limiter[expiration.TokenHash]
	addresses *limiter[netip.Prefix]
}

func newLimits(cfg RateLimiting) *limits {
	if !cfg.Enabled {
		return &limits{cfg: cfg}
	}
	return &limits{
		cfg:       cfg,
		tokens:    newLimiter[expiration.TokenHash](cfg.Token, rememberedTokens),
		addresses: newLimiter[netip.Prefix](cfg.UnknownToken, rememberedAddresses),
	}
}

// wait returns 0 if the request is allowed now, and else after how long it will be.
func (l *limits) wait(req *http.Request, token expiration.TokenHash, known bool, now time.Time) time.Duration {
	switch {
	case !l.cfg.Enabled:
		return 0
	case known:
		return l.tokens.wait(token, now)
	}
	return l.addresses.wait(clientNetwork(req, l.cfg.RealIPHeader), now)
}

// clientNetwork returns the client's address; for IPv6 its /64, of which one client has all. A header counts only if the
// operator has said that a proxy sets it, and of a list only the last entry: the others may be the client's invention.
func clientNetwork(req *http.Request, realIPHeader string) netip.Prefix {
	host, _, err := net.SplitHostPort(req.RemoteAddr)
	if err != nil {
		host = req.RemoteAddr
	}
	if realIPHeader != "" {
		if values := req.Header.Values(realIPHeader); len(values) > 0 {
			last := values[len(values)-1]
			host = strings.TrimSpace(last[strings.LastIndexByte(last, ',')+1:])
		}
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return netip.Prefix{} // a Unix socket, or a proxy that sends nonsense: one bucket for all of them
	}
	addr = addr.Unmap().WithZone("")
	bits := addr.BitLen()
	if addr.Is6() {
		bits = 64
	}
	prefix, _ := addr.Prefix(bits)
	return prefix
}
