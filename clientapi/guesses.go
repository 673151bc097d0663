package clientapi

import (
	"net/http"
	"net/netip"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
)

// guesses limits the requests with unknown tokens from each address. Requests with known tokens are counted by the engine.
type guesses struct {
	limiter *limits.Limiter[netip.Prefix]
	// realIPHeader is the header in which a trusted reverse proxy names the client's address, or "" if there is none.
	realIPHeader string
}

func newGuesses(limit expiration.RateLimit, realIPHeader string) *guesses {
	return &guesses{limits.New[netip.Prefix](limit), realIPHeader}
}

// mayAsk returns a *rateError if there are too many requests with one known token or delay ID, or too many with unknown ones from one
// address. known and wait are the engine's answer about the token.
func (g *guesses) mayAsk(req *http.Request, known bool, wait time.Duration) error {
	if !known {
		wait = g.limiter.Wait(limits.ClientNetwork(req, g.realIPHeader), time.Now())
	}
	if wait > 0 {
		return &rateError{retryAfter: wait}
	}
	return nil
}
