package clientapi

import (
	"net/http"
	"net/netip"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

// guesses limits the requests with unknown tokens and delay IDs from each address. The engine counts requests with known ones.
type guesses struct {
	limiter *limits.Limiter[netip.Prefix]
	// realIPHeader is the header in which a trusted reverse proxy names the client's address, or "" if there is none.
	realIPHeader string
}

func newGuesses(limit expiration.RateLimit, realIPHeader string) *guesses {
	return &guesses{limits.New[netip.Prefix](limit), realIPHeader}
}

// count counts a request with an unknown token or delay ID. It returns a *webapi.RateError if there are too many from one address.
func (g *guesses) count(req *http.Request) error {
	return webapi.Limited(g.limiter.Wait(limits.ClientNetwork(req, g.realIPHeader), time.Now()))
}
