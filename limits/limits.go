// Package limits limits the rate of requests from one address or of one user. Dendrite's own limiter is not enough: it trusts any
// X-Forwarded-For header, and without that header it treats each connection as a new client.
package limits

import (
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// remembered is how many keys a Limiter remembers. A forgotten key starts afresh. A client cannot profit from that: to make the Limiter
// forget a key takes more requests than are then allowed.
const remembered = 1 << 14

// Rate is how many requests are allowed at once, and how fast that allowance recovers.
type Rate = expiration.RateLimit

// Limiter limits the requests with each key.
type Limiter[K comparable] struct {
	limit   Rate
	start   time.Time
	buckets *lru.Cache[K, *bucket]
}

// bucket is the state of one key.
type bucket struct {
	mu sync.Mutex // guards Bucket; no other lock is taken while it is held
	expiration.Bucket
}

// New returns a limiter. The zero limit allows everything.
func New[K comparable](limit Rate) *Limiter[K] {
	buckets, err := lru.New[K, *bucket](remembered)
	if err != nil {
		panic(err) // only for a size below 1
	}
	return &Limiter[K]{limit: limit, start: time.Now(), buckets: buckets}
}

// Wait returns 0 if a request with this key is allowed now, or else the time until it is.
func (l *Limiter[K]) Wait(key K, now time.Time) time.Duration {
	b, ok := l.buckets.Get(key)
	if !ok {
		b = &bucket{}
		if earlier, ok, _ := l.buckets.PeekOrAdd(key, b); ok {
			b = earlier
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Take(l.limit, now.Sub(l.start))
}

// ClientNetwork returns the client's address, or its /64 network for IPv6, because one client usually has all of a /64. A header counts
// only if the operator has configured it as set by a proxy. If it has a list, only the last entry counts, because the client may have
// invented the others.
func ClientNetwork(req *http.Request, realIPHeader string) netip.Prefix {
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

// Exceeded is the answer to a request above the rate limit. It says both in the body and in a header how long to wait, because browsers
// cannot read the header with Dendrite's CORS settings.
func Exceeded(msg string, after time.Duration) util.JSONResponse {
	ms := max((after + time.Millisecond - 1).Milliseconds(), 1)
	return util.JSONResponse{
		Code:    http.StatusTooManyRequests,
		JSON:    spec.LimitExceeded(msg, ms),
		Headers: map[string]string{"Retry-After": strconv.FormatInt((ms+999)/1000, 10)},
	}
}
