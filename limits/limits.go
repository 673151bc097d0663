// Package limits bounds the requests from one address or of one user. Dendrite's own limiter trusts any X-Forwarded-For header,
// and without one it takes each connection for a client of its own.
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

// remembered is how many keys are remembered. A forgotten key starts afresh; to be forgotten costs a client more requests than it gains.
const remembered = 1 << 14

// Rate is how many requests are allowed, and how fast.
type Rate = expiration.RateLimit

// Limiter limits the requests with each key.
type Limiter[K comparable] struct {
	limit   Rate
	start   time.Time
	buckets *lru.Cache[K, *bucket]
}

// bucket is what is remembered of a key.
type bucket struct {
	mu sync.Mutex // guards the other; a leaf
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

// ClientNetwork returns the client's address; for IPv6 its /64, because one client has all of it. A header counts only if the
// operator has said that a proxy sets it. Of a list only the last entry counts: the client may have invented the others.
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

// Exceeded is the answer to a request that came too soon. It has the pause twice, in the body and in a header: with Dendrite's
// CORS settings browsers cannot read the header.
func Exceeded(msg string, after time.Duration) util.JSONResponse {
	ms := max((after + time.Millisecond - 1).Milliseconds(), 1)
	return util.JSONResponse{
		Code:    http.StatusTooManyRequests,
		JSON:    spec.LimitExceeded(msg, ms),
		Headers: map[string]string{"Retry-After": strconv.FormatInt((ms+999)/1000, 10)},
	}
}
