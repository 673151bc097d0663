// Package clientapi is the client's side of expiring and of delayed events: the field m.will_expire in the requests that
// send events, and the keep-alive endpoint; the delay in the query of such requests, and the endpoints of delayed events.
//
// Its routes for sending take the place of Dendrite's, whose own function they call: a request with neither field nor delay
// is handled by it unchanged. All that a request holds in memory is bounded but for the body of a send without a delay, which
// Dendrite does not bound either.
package clientapi

import (
	"context"
	"iter"
	"net/http"
	"os"
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
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/keylock"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
)

// Timers is what the routes need of the component.
type Timers interface {
	Begin(ctx context.Context, e expiration.Event, duration time.Duration, exempt bool) (*expiration.Pending, error)
	LockRequest(ctx context.Context, request expiration.RequestHash) (unlock func(), err error)
	Sent(ctx context.Context, request expiration.RequestHash) (eventID string, err error)
	Token(eventID string) string
	Running(eventID, sender string) bool
	Restart(ctx context.Context, eventID string, duration time.Duration) error
	LockState(ctx context.Context, s expiration.StateKey) (unlock func(), err error)
	Allow(expiration.TokenHash) (known bool, wait time.Duration)
	Refresh(context.Context, expiration.TokenHash) error
	End(context.Context, expiration.TokenHash) error

	Scheduled(ctx context.Context, request expiration.RequestHash) (delayID string, err error)
	Schedule(
		ctx context.Context, e expiration.Event, d expiration.Delayed, delay time.Duration, exempt bool,
	) (delayID string, err error)
	AllowDelayed(delayID string) (known bool, wait time.Duration)
	RestartDelayed(ctx context.Context, delayID, owner string) error
	SendDelayed(ctx context.Context, delayID, owner string) error
	CancelDelayed(ctx context.Context, delayID, owner string) error
	DelayedEvents(ctx context.Context, owner, after string) iter.Seq2[expiration.DelayedEvent, error]
	DelayedEvent(ctx context.Context, delayID, owner string) (expiration.DelayedEvent, error)
}

// Config is what the routes can be told; see docs/configuration.md.
type Config struct {
	// MaxDuration is the longest duration that a client may ask for, in whole seconds.
	MaxDuration time.Duration
	// UnknownTokens limits the requests with unknown tokens and delay IDs from one address, and RealIPHeader is the header in which a
	// trusted reverse proxy names it, or "" if there is none.
	UnknownTokens expiration.RateLimit
	// UserRequests limits the requests of one user that schedule delayed events, or look them up. Application services are exempt.
	UserRequests expiration.RateLimit
	RealIPHeader string
	// MaxDelay is the longest delay of a delayed event, and MaxScheduled how many of them a user may have scheduled.
	MaxDelay     time.Duration
	MaxScheduled int
}

// RoomserverAPI is the roomserver as the rest of Dendrite has it.
type RoomserverAPI interface {
	api.ClientRoomserverAPI
	// Hooked returns the request and the roomserver for one call of Dendrite's SendEvent, which calls the hook.
	Hooked(req *http.Request, hook *expiration.Hook) (*http.Request, api.ClientRoomserverAPI)
	// LockSender waits until no other event of a user is being sent into a room. It is held for each call of SendEvent.
	LockSender(ctx context.Context, roomID, userID string) (unlock func(), err error)
}

// API has what the routes share.
type API struct {
	cfg          Config
	dendrite     *config.ClientAPI
	rsAPI        RoomserverAPI
	timers       Timers
	transactions *transactions.Cache
	guesses      *guesses
	users        *limits.Limiter[string] // by their IDs
	costly       *keylock.Locks[string]  // by the users' IDs, see begin
	metrics      *metrics
}

// New returns the routes.
func New(cfg Config, dendrite *config.ClientAPI, rsAPI RoomserverAPI, timers Timers) *API {
	return &API{
		cfg: cfg, dendrite: dendrite, rsAPI: rsAPI, timers: timers,
		transactions: transactions.New(),
		guesses:      newGuesses(cfg.UnknownTokens, cfg.RealIPHeader),
		users:        limits.New[string](cfg.UserRequests),
		costly:       keylock.Bounded[string](maxWaiting),
		metrics:      newMetrics(),
	}
}

// Collectors returns the metrics of the routes, to be registered once.
func (a *API) Collectors() []prometheus.Collector {
	return []prometheus.Collector{a.metrics.keepAlives}
}

// AddRoutes registers the routes. It must be called before Dendrite registers its own: the first that matches is taken.
func (a *API) AddRoutes(router *mux.Router, userAPI userapi.QueryAcccessTokenAPI) {
	untraced(func() { a.addRoutes(router, userAPI) })
}

func (a *API) addRoutes(router *mux.Router, userAPI userapi.QueryAcccessTokenAPI) {
	for method, handler := range a.keepAlives() { // first, because they are the most frequent
		router.Handle(keepAlivePath+method, handler).Methods(http.MethodPut, http.MethodOptions)
	}
	v3 := router.PathPrefix("/{apiversion:(?:r0|v3)}/").Subrouter()
	a.addDelayed(router, userAPI)
	v3.Handle("/capabilities", capabilitiesHandler(userAPI, a.rsAPI, &a.dendrite.RateLimiting, a.cfg.MaxDelay, a.cfg.MaxScheduled)).
		Methods(http.MethodGet, http.MethodOptions)
	send := func(path, method string, f func(*http.Request, *userapi.Device, map[string]string) util.JSONResponse) {
		v3.Handle(path, a.authenticated(userAPI, f)).Methods(method, http.MethodOptions)
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

// authenticated returns a handler for clients who say who they are, guests among them, with the decoded parts of the path.
func (a *API) authenticated(
	userAPI userapi.QueryAcccessTokenAPI, f func(*http.Request, *userapi.Device, map[string]string) util.JSONResponse,
) http.Handler {
	return httputil.MakeAuthAPI("send_message", userAPI, func(req *http.Request, device *userapi.Device) util.JSONResponse {
		vars, err := httputil.URLDecodeMapValues(mux.Vars(req))
		if err != nil {
			return util.ErrorResponse(err)
		}
		return f(req, device, vars)
	}, httputil.WithAllowGuests())
}

// KeepAlivesFirst returns a handler that answers keep-alives as the routes do, and gives everything else to next, which has
// the routes too. Dendrite's routers ask one regular expression after the other until they have found them.
func (a *API) KeepAlivesFirst(next http.Handler) http.Handler {
	first := map[string]http.Handler{}
	for method, handler := range a.keepAlives() {
		first[strings.TrimSuffix(httputil.PublicClientPathPrefix, "/")+keepAlivePath+method] = handler
	}
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		// The routers compare paths as they were written: an escaped one has a RawPath, and no route.
		if handler := first[req.URL.Path]; handler != nil && req.Method == http.MethodPut && req.URL.RawPath == "" {
			handler.ServeHTTP(w, req)
			return
		}
		next.ServeHTTP(w, req)
	})
}

// untraced calls f with Dendrite's tracing of whole requests switched off, which is decided when a route is made: what is
// sent and answered here has tokens in it, and they belong into no log.
func untraced(f func()) {
	const variable = "DENDRITE_TRACE_HTTP"
	if value, ok := os.LookupEnv(variable); ok {
		_ = os.Unsetenv(variable)
		defer func() { _ = os.Setenv(variable, value) }()
	}
	f()
}
