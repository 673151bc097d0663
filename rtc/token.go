package rtc

import (
	"context"
	"fmt"
	"net/http"

	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/dendrite/setup/config"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

// tokenPaths are the paths of MSC4195 without the prefix of the client or federation API, the one to ask first at the front. Other servers
// know only the unstable one for now.
var tokenPaths = []string{"/unstable/io.element.msc4195/rtc/livekit", "/v1/rtc/livekit"}

// SFU is what is asked of LiveKit, see *livekit.Client.
type SFU interface {
	CreateRoom(ctx context.Context, name string) (livekit.Room, error)
	Room(ctx context.Context, name string) (livekit.Room, error)
	Token(g livekit.Grant) (string, error)
	Hear(authorization string, body []byte) (livekit.Event, error)
}

// Participants remembers for whom tokens were made, so that they can be removed from the SFU when they leave the room.
type Participants interface {
	// Remember notes durably for whom a token is about to be made. The error is ErrNotJoined, ErrTooMany, or passing.
	Remember(ctx context.Context, p Participant) error
}

// Participant is a user at LiveKit.
type Participant struct {
	livekit.Participant
	RoomID, UserID string // of Matrix
}

// TokenConfig configures the tokens.
type TokenConfig struct {
	// URL is where clients reach LiveKit, without a slash at its end.
	URL string
	// ServicePath is where the service's API is, below /_matrix/client.
	ServicePath string
	// FullAccessServers are the servers whose users may publish.
	FullAccessServers []string
	// UserRequests limits the requests of each user: those for tokens and, counted apart, those that hand over a leave event. Application
	// services are exempt. ServerRequests limits those of each other server, and, counted apart, those for the service of each address.
	// RealIPHeader is the header in which a trusted reverse proxy names that address, or "" if there is none.
	UserRequests, ServerRequests limits.Rate
	RealIPHeader                 string
}

// Parts are what Tokens uses. All but SFU and Rooms may be nil: then nobody is remembered, no leave event and no token of an expiring event
// can be handed over, and LiveKit's webhooks tell nothing.
type Parts struct {
	SFU              SFU
	Rooms            Rooms
	Participants     Participants
	Delegations      Delegations
	TokenDelegations TokenDelegations
	Hints            Hints
}

// Tokens gives tokens of LiveKit to the users of this server and of others (MSC4195). A token is only for a user who is joined to the room,
// and only for this user's own participant. The room at LiveKit is made first.
type Tokens struct {
	cfg      TokenConfig
	dendrite *config.Global
	parts    Parts
	users    *limits.Limiter[string] // by user ID; requests for tokens
	leaves   *limits.Limiter[string] // by user ID; see delegateLeave
	places   *limits.Places          // of requests that make this server ask others
	others   Federation
}

// NewTokens returns the tokens of one LiveKit.
func NewTokens(cfg TokenConfig, dendrite *config.Global, parts Parts) *Tokens {
	return &Tokens{
		cfg: cfg, dendrite: dendrite, parts: parts, places: limits.NewPlaces(),
		users: limits.New[string](cfg.UserRequests), leaves: limits.New[string](cfg.UserRequests),
	}
}

// UserAPI is the part of the user API that tokens need.
type UserAPI interface {
	userapi.QueryAcccessTokenAPI
	QueryOpenIDToken(ctx context.Context, req *userapi.QueryOpenIDTokenRequest, res *userapi.QueryOpenIDTokenResponse) error
}

// AddRoutes registers all routes. It must be called before Dendrite registers its own routes. Without Delegations there is none for handing
// over a leave event: Element Call takes any answer but 404 for a promise that it can be handed over.
func (t *Tokens) AddRoutes(routers httputil.Routers, userAPI UserAPI, others Federation) {
	t.others = others
	forUsers := webapi.Authenticated("rtc_get_token", userAPI, func(req *http.Request, device *userapi.Device, _ map[string]string) util.JSONResponse {
		jwt, err := t.forUser(req, device)
		return respond(req, tokenAnswer{jwt}, err)
	})
	forServers := t.forServers()
	leaves := webapi.Authenticated("rtc_delegate", userAPI, func(req *http.Request, device *userapi.Device, _ map[string]string) util.JSONResponse {
		return respond(req, struct{}{}, t.delegateLeave(req, device))
	})
	for _, path := range tokenPaths {
		post(routers.Client, path+"/get_token", forUsers)
		post(routers.Federation, path+"/get_token", forServers)
		if t.parts.Delegations != nil {
			post(routers.Client, path+"/delegate_delayed_leave", leaves)
		}
	}
	newService(t, userAPI).addRoutes(routers.Client)
}

// post registers a handler of POST requests with small bodies.
func post(router *mux.Router, path string, handler http.Handler) {
	router.Handle(path, webapi.Bounded(maxBody, bodyTimeout, handler)).Methods(http.MethodPost, http.MethodOptions)
}

// tokenAnswer is the answer of get_token.
type tokenAnswer struct {
	JWT string `json:"jwt"`
}

// forUser returns a token for a user of this server. If the SFU is another server's, that server makes the token.
func (t *Tokens) forUser(req *http.Request, device *userapi.Device) (jwt string, err error) {
	if err = webapi.MayRequest(t.users, device); err != nil {
		return "", err
	}
	body, err := webapi.ReadBody(req.Body)
	if err != nil {
		return "", err
	}
	f := matrixFields(body)
	url, m, server := f.text("url", maxSecret), f.member(device.UserID), spec.ServerName(f.optional("server_name"))
	if f.err != nil {
		return "", f.err
	}
	ctx := req.Context()
	if err = t.checkJoined(ctx, m); err != nil {
		return "", err
	}
	switch {
	case t.dendrite.IsLocalServerName(server), server == "" && t.isOurs(url):
		return t.ours(ctx, m, url, true)
	}
	leave, err := t.places.Enter(ctx, device)
	if err != nil {
		return "", errCrowded
	}
	defer leave()
	if server == "" {
		return t.ofPublisher(ctx, m, url)
	}
	return t.ofServer(ctx, m, url, server)
}

// checkJoined returns errNotJoined unless the member's user is joined to the room.
func (t *Tokens) checkJoined(ctx context.Context, m member) error {
	joined, err := t.parts.Rooms.Joined(ctx, m.roomID, m.userID)
	if err == nil && !joined {
		err = errNotJoined
	}
	return err
}

func (t *Tokens) isOurs(url string) bool { return trimmed(url) == t.cfg.URL }

// ours returns a token for the SFU of this server.
func (t *Tokens) ours(ctx context.Context, m member, url string, publish bool) (string, error) {
	if !t.isOurs(url) {
		return "", errNotOurs
	}
	return t.makeToken(ctx, m, publish)
}

// makeToken makes the room at LiveKit if it is not there, and a token for the member. Its caller has looked whether the user is joined.
func (t *Tokens) makeToken(ctx context.Context, m member, publish bool) (string, error) {
	p := m.participant()
	if _, err := t.parts.SFU.CreateRoom(ctx, p.Room); err != nil {
		return "", fmt.Errorf("making a room: %w", err)
	}
	return t.sign(ctx, m, livekit.Grant{Participant: p, Publish: publish})
}

// sign remembers the member, and returns a token.
func (t *Tokens) sign(ctx context.Context, m member, g livekit.Grant) (string, error) {
	if t.parts.Participants != nil {
		if err := t.parts.Participants.Remember(ctx, Participant{g.Participant, m.roomID, m.userID}); err != nil {
			return "", refusalOf(err)
		}
	}
	return t.parts.SFU.Token(g)
}
