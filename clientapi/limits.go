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

// rememberedAddresses is how many addresses are remembered. Who is forgotten starts afresh, which costs more requests than it
// gains.
const rememberedAddresses = 1 << 14

// guesses limits the requests with unknown tokens from each address (contract, section 2). How many there are with one that is
// known, the component counts.
type guesses struct {
	limit expiration.RateLimit
	// realIPHeader is the header in which a trusted reverse proxy names the client's address, or "" if there is none.
	realIPHeader string
	start        time.Time
	buckets      *lru.Cache[netip.Prefix, *bucket]
}

// bucket is what is remembered of an address.
type bucket struct {
	mu sync.Mutex // guards the other; a leaf
	expiration.Bucket
}

func newGuesses(limit expiration.RateLimit, realIPHeader string) *guesses {
	buckets, err := lru.New[netip.Prefix, *bucket](rememberedAddresses)
	if err != nil {
		panic(err) // only for a size below 1
	}
	return &guesses{limit: limit, realIPHeader: realIPHeader, start: time.Now(), buckets: buckets}
}

// wait returns 0 if the request is allowed now, and else after how long it will be.
func (g *guesses) wait(req *http.Request, now time.Time) time.Duration {
	address := clientNetwork(req, g.realIPHeader)
	b, ok := g.buckets.Get(address)
	if !ok {
		b = &bucket{}
		if earlier, ok, _ := g.buckets.PeekOrAdd(address, b); ok {
			b = earlier
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Take(g.limit, now.Sub(g.start))
}

// mayAsk returns a *rateError if there are too many requests with a token or delay ID, of which the component says whether it
// is known and how long to wait, or too many with unknown ones from this address.
func (g *guesses) mayAsk(req *http.Request, known bool, wait time.Duration) error {
	if !known {
		wait = g.wait(req, time.Now())
	}
	if wait > 0 {
		return &rateError{retryAfter: wait}
	}
	return nil
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
