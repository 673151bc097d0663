// Package rtc is the call backend: it tells clients which transports their calls can use (MatrixRTC, MSC4143), gives them tokens for LiveKit,
// and takes over their leave events (MSC4195).
//
// What it guarantees:
//
//   - A server without transports has none of the routes. If another service makes the tokens, it only has those that tell the transports.
//   - A token is only for a user who is joined to the room, for this user's own participant, and for a few minutes. Users of other servers
//     can only listen, unless the configuration says otherwise.
//   - A leave event is only taken over from its own user, who is joined to its room, and for this user's own participant. An expiring event is
//     taken over with its token, and for a participant of its own sender. If they cannot be taken over, there is no route for it.
//   - No answer tells whether a user, a room or a device exists.
//   - Another server is asked only if it is in the room. What it answers is bounded, in size and time.
//   - No token gets into the log.
package rtc

import (
	"encoding/json"
	"net/http"
	"slices"

	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/internal/httputil"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/util"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/around"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

const (
	// TypeLiveKit is the type of a transport that is an SFU of LiveKit, as all clients know it. MSC4519 registers it as the unstable one.
	TypeLiveKit = "livekit"
	// typeLiveKitStable is the same in the newest text of MSC4195.
	typeLiveKitStable = "m.livekit"

	// wellKnownTransports is the key in /.well-known/matrix/client, for clients that do not know the endpoints.
	wellKnownTransports = "org.matrix.msc4143.rtc_foci"
	// featureRTC and featureSticky are the flags in /versions of MSC4143 and of sticky events.
	featureRTC, featureSticky = "org.matrix.msc4143", "org.matrix.msc4354"
)

// Transport carries the media of calls.
type Transport struct {
	// Type is TypeLiveKit.
	Type string `yaml:"type" json:"type"`
	// LiveKitServiceURL is the service that gives clients tokens for LiveKit's SFU, with OpenID tokens as logins. No MSC has this key, but
	// Element Call 0.26.1 needs it.
	LiveKitServiceURL string `yaml:"livekit_service_url" json:"livekit_service_url"`
	// URL is the SFU itself (MSC4195), if this server makes the tokens for it, or "".
	URL string `yaml:"-" json:"url,omitempty"`
}

// Config configures what clients are told.
type Config struct {
	// Transports are the transports, the best first. Without any, there are no routes.
	Transports []Transport
	// UserRequests limits the requests of each user for the transports. Application services are exempt.
	UserRequests limits.Rate
	// Tokens are the tokens that this server makes itself, or nil if another service makes them.
	Tokens *TokenConfig
}

// Discovery tells clients which transports their calls can use. All its answers are made of one list.
type Discovery struct {
	transports []Transport
	users      *limits.Limiter[string] // by user ID
}

// NewDiscovery returns the answers of a server whose /versions has these unstable features, beside those of Discovery.
func NewDiscovery(cfg Config, features []string) *Discovery {
	d := &Discovery{transports: slices.Clone(cfg.Transports), users: limits.New[string](cfg.UserRequests)}
	if !announcesURL(features) {
		for i := range d.transports {
			d.transports[i].URL = ""
		}
	}
	return d
}

// announcesURL reports whether clients are told the URL of the SFU itself. Newer ones then publish only with a token of this server's
// get_token. Whether that works without sticky events has not been tried; with livekit_service_url alone it does.
func announcesURL(features []string) bool { return slices.Contains(features, featureSticky) }

// Features returns the unstable features that /versions has because of the transports.
func (d *Discovery) Features() []string {
	if len(d.transports) == 0 {
		return nil
	}
	return []string{featureRTC}
}

// AddRoutes registers the routes that announce the transports. It must be called before Dendrite registers its own routes.
//
// Without transports it registers nothing, so that Dendrite answers 404 with M_UNRECOGNIZED and CORS headers. An empty list would be worse:
// clients would not look into a well-known file that another server may serve for this one.
func (d *Discovery) AddRoutes(routers httputil.Routers, userAPI userapi.QueryAcccessTokenAPI) {
	if len(d.transports) == 0 {
		return
	}
	handle := func(path string, answer any) {
		routers.Client.Handle(path, webapi.Authenticated("rtc_transports", userAPI,
			func(req *http.Request, device *userapi.Device, _ map[string]string) util.JSONResponse {
				if err := webapi.MayRequest(d.users, device); err != nil {
					return webapi.ErrorResponse(req, err, "Failed to tell the transports of calls")
				}
				return util.JSONResponse{Code: http.StatusOK, JSON: answer}
			},
		)).Methods(http.MethodGet, http.MethodOptions)
	}
	// matrix-js-sdk 43.0.0 reads this path and this key only.
	handle("/unstable/org.matrix.msc4143/rtc/transports", map[string][]Transport{"rtc_transports": d.transports})
	// The key is transports in MSC4143 and MSC4195, and rtc_transports in MSC4519.
	stable := d.withStableTypes()
	handle("/v1/rtc/transports", map[string][]Transport{"rtc_transports": stable, "transports": stable})
	routers.WellKnown.Use(d.wellKnown())
}

// withStableTypes returns the transports with each of them twice, once for each name of its type.
func (d *Discovery) withStableTypes() (all []Transport) {
	for _, transport := range d.transports {
		all = append(all, transport)
		transport.Type = typeLiveKitStable
		all = append(all, transport)
	}
	return all
}

// wellKnown returns a middleware that adds the transports to Dendrite's /.well-known/matrix/client, if Dendrite is configured to serve it.
func (d *Discovery) wellKnown() mux.MiddlewareFunc {
	return around.Object(httputil.PublicWellKnownPrefix+"client", "wellknown", func(client map[string]json.RawMessage) (err error) {
		client[wellKnownTransports], err = json.Marshal(d.transports)
		return err
	})
}
