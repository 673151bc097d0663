package rtc

import (
	"context"
	"net/http"
	"slices"
	"time"

	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/fclient"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

// Federation is what calls need of other servers.
type Federation struct {
	// KeyRing verifies the requests of other servers.
	KeyRing gomatrixserverlib.JSONVerifier
	// Client asks other servers for tokens, and about their users.
	Client HTTP
}

// forServers answers get_token of other servers, which ask for their users.
//
// Dendrite's MakeFedAPI cannot be used: it takes a FederationWakeups, which needs an internal type of Dendrite's.
func (t *Tokens) forServers() http.Handler {
	origins := limits.New[spec.ServerName](t.cfg.ServerRequests)
	return webapi.Untraced("rtc_federation_get_token", func(req *http.Request) util.JSONResponse {
		signed, refused := fclient.VerifyHTTPRequest(req, time.Now(), t.dendrite.ServerName, t.dendrite.IsLocalServerName, t.others.KeyRing)
		if signed == nil {
			return refused
		}
		if err := webapi.Limited(origins.Wait(signed.Origin(), time.Now())); err != nil {
			return respond(req, nil, err)
		}
		jwt, err := t.forServer(req.Context(), signed.Origin(), signed.Content())
		return respond(req, tokenAnswer{jwt}, err)
	})
}

// forServer returns a token for a user of another server. By default it is only for listening.
func (t *Tokens) forServer(ctx context.Context, origin spec.ServerName, body []byte) (string, error) {
	f := matrixFields(body)
	url, m := f.text("url", maxSecret), f.member(f.name("user_id"))
	if f.err != nil {
		return "", f.err
	}
	if user, err := spec.NewUserID(m.userID, true); err != nil || user.Domain() != origin {
		return "", errNotOfOrigin
	}
	if err := t.checkJoined(ctx, m); err != nil {
		return "", err
	}
	return t.ours(ctx, m, url, t.hasFullAccess(origin))
}

// hasFullAccess reports whether users of a server may publish, and have rooms made for them. All names of this server are the same server.
func (t *Tokens) hasFullAccess(server spec.ServerName) bool {
	if t.dendrite.IsLocalServerName(server) {
		server = t.dendrite.ServerName
	}
	return slices.Contains(t.cfg.FullAccessServers, string(server))
}
