// Package clientapi is the HTTP interface of expiring and delayed events. It parses and limits requests, and turns results into answers
// and Matrix errors.
//
// To expire an event, a client marks it with the field m.will_expire and calls the keep-alive endpoint, or hands it over to an SFU there. To
// delay an event, a client adds a delay to the query of a send, or uses the endpoint delayed_event. It then calls the endpoints of delayed
// events. The routes for sending replace Dendrite's routes and call Dendrite's SendEvent, so a request with neither field nor delay is handled
// as in stock Dendrite, unless its query is malformed. The memory of each request is bounded. The exception is the body of a send without a
// delay, which Dendrite does not bound either.
package clientapi

import (
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/dendrite/internal/transactions"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/setup/config"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/util"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

// Timers is the part of the engine that the routes use. Each of the interfaces is defined beside its routes, and can be replaced alone. A
// Delegator of nil means that no SFU keeps timers alive.
type Timers struct {
	Keeper
	Sender
	Scheduler
	Actor
	Finder
	Delegator
}

// Config configures the routes; see docs/configuration.md.
type Config struct {
	// MaxDuration is the longest duration that a client may ask for, in whole seconds.
	MaxDuration time.Duration
	// DelayIDs limits the requests without an access token that have the same delay ID. The engine counts those whose event is scheduled.
	DelayIDs expiration.RateLimit
	// UnknownTokens limits the requests with unknown tokens and delay IDs from one address. RealIPHeader is the header in which a trusted
	// reverse proxy names that address, or "" if there is none.
	UnknownTokens expiration.RateLimit
	RealIPHeader  string
	// UserRequests limits two kinds of requests of one user, each with a counter of its own: those that schedule or look up delayed events,
	// and those that act on them with an access token. Application services are exempt.
	UserRequests expiration.RateLimit
	// MaxDelay is the longest delay of a delayed event.
	MaxDelay time.Duration
	// MaxScheduled is how many delayed events a user may have scheduled at a time; 0 switches them off. MaxScheduledOfService is the same
	// for a user of an application service.
	MaxScheduled, MaxScheduledOfService int
}

// RoomserverAPI is the roomserver behind the wrapper of package roomserver.
type RoomserverAPI interface {
	api.ClientRoomserverAPI
	// Hooked returns the request and the roomserver for one call of Dendrite's SendEvent, which calls the hook.
	Hooked(req *http.Request, hook *expiration.Hook) (*http.Request, api.ClientRoomserverAPI)
	// LockSender waits until no other event of the user is being sent into the room. Each call of SendEvent runs under this lock.
	LockSender(ctx context.Context, roomID, userID string) (unlock func(), err error)
}

// API has the routes.
type API struct {
	cfg          Config
	dendrite     *config.ClientAPI
	rsAPI        RoomserverAPI
	timers       Timers
	transactions *transactions.Cache
	guesses      *guesses
	users        *limits.Limiter[string]               // by user ID; requests that schedule or look up
	ended        *limits.Limiter[expiration.TokenHash] // by delay ID; requests whose event is not scheduled
	actors       *limits.Limiter[string]               // by user ID; see act
	places       *limits.Places                        // for sends of expiring and delayed events, and for requests that schedule or look up
	metrics      *metrics
}

// New returns the routes.
func New(cfg Config, dendrite *config.ClientAPI, rsAPI RoomserverAPI, timers Timers) *API {
	return &API{
		cfg: cfg, dendrite: dendrite, rsAPI: rsAPI, timers: timers,
		transactions: transactions.New(),
		guesses:      newGuesses(cfg.UnknownTokens, cfg.RealIPHeader),
		users:        limits.New[string](cfg.UserRequests),
		ended:        limits.New[expiration.TokenHash](cfg.DelayIDs),
		actors:       limits.New[string](cfg.UserRequests),
		places:       limits.NewPlaces(),
		metrics:      newMetrics(),
	}
}

// Collectors returns the metrics of the routes, to be registered once.
func (a *API) Collectors() []prometheus.Collector {
	return []prometheus.Collector{a.metrics.keepAlives}
}

// AddRoutes registers the routes. It must be called before Dendrite registers its own, because the router uses the first match.
func (a *API) AddRoutes(router *mux.Router, userAPI userapi.QueryAcccessTokenAPI) {
	for method, handler := range a.keepAlives() { // first, because they are the most frequent
		router.Handle(keepAlivePath+method, handler).Methods(http.MethodPut, http.MethodOptions)
	}
	v3 := router.PathPrefix("/{apiversion:(?:r0|v3)}/").Subrouter()
	a.addDelayed(router, userAPI)
	v3.Handle("/capabilities", capabilitiesHandler(userAPI, a.rsAPI, &a.dendrite.RateLimiting, a.cfg)).
		Methods(http.MethodGet, http.MethodOptions)
	send := func(path, method string, f func(*http.Request, *userapi.Device, map[string]string) util.JSONResponse) {
		v3.Handle(path, webapi.Authenticated("send_message", userAPI, f)).Methods(method, http.MethodOptions)
	}
	send("/rooms/{roomID}/send/{eventType}", http.MethodPost,
		func(req *http.Request, device *userapi.Device, vars map[string]string) util.JSONResponse {
			return a.send(req, device, target{roomID: vars["roomID"], eventType: vars["eventType"]})
		})
	send("/rooms/{roomID}/send/{eventType}/{txnID}", http.MethodPut,
		func(req *http.Request, device *userapi.Device, vars map[string]string) util.JSONResponse {
			txnID := vars["txnID"]
			return a.send(req, device, target{roomID: vars["roomID"], eventType: vars["eventType"], txnID: &txnID})
		})
	send("/rooms/{roomID}/state/{eventType:[^/]+/?}", http.MethodPut,
		func(req *http.Request, device *userapi.Device, vars map[string]string) util.JSONResponse {
			stateKey, eventType := "", strings.TrimSuffix(vars["eventType"], "/")
			return a.send(req, device, target{roomID: vars["roomID"], eventType: eventType, stateKey: &stateKey})
		})
	send("/rooms/{roomID}/state/{eventType}/{stateKey}", http.MethodPut,
		func(req *http.Request, device *userapi.Device, vars map[string]string) util.JSONResponse {
			stateKey := vars["stateKey"]
			return a.send(req, device, target{roomID: vars["roomID"], eventType: vars["eventType"], stateKey: &stateKey})
		})
}

// KeepAlivesFirst returns a handler that answers keep-alives itself and passes all other requests to next, which has the same routes.
// It saves time: Dendrite's routers try one regular expression after the other, which costs more than the rest of a keep-alive.
func (a *API) KeepAlivesFirst(next http.Handler) http.Handler {
	first := map[string]http.Handler{}
	for method, handler := range a.keepAlives() {
		first[strings.TrimSuffix(httputil.PublicClientPathPrefix, "/")+keepAlivePath+method] = handler
	}
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		// The routers match the escaped path. A path with escapes has a RawPath, and there is no route for it.
		if handler := first[req.URL.Path]; handler != nil && req.Method == http.MethodPut && req.URL.RawPath == "" {
			handler.ServeHTTP(w, req)
			return
		}
		next.ServeHTTP(w, req)
	})
}
