// Package clientapi is the client's side of expiring events: the field m.will_expire in the requests that send events,
// and the keep-alive endpoint.
//
// Its routes for sending take the place of Dendrite's, whose own function they call: a request without the field is
// handled by it unchanged. All that a request holds in memory is bounded but for the body of a send, which Dendrite does
// not bound either.
package clientapi

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/internal"
	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/dendrite/internal/transactions"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/setup/config"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/util"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
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
	Known(expiration.TokenHash) bool
	Refresh(context.Context, expiration.TokenHash) error
	End(context.Context, expiration.TokenHash) error
}

// Config is what the routes can be told; see docs/configuration.md.
type Config struct {
	// MaxDuration is the longest duration that a client may ask for, in whole seconds.
	MaxDuration  time.Duration
	RateLimiting RateLimiting
}

// API has what the routes share.
type API struct {
	cfg          Config
	dendrite     *config.ClientAPI
	rsAPI        api.ClientRoomserverAPI
	timers       Timers
	transactions *transactions.Cache
	limits       *limits
	metrics      *metrics
}

// New returns the routes. The roomserver API is the wrapper that knows hooks, and the one that the rest of Dendrite has.
func New(cfg Config, dendrite *config.ClientAPI, rsAPI api.ClientRoomserverAPI, timers Timers) *API {
	return &API{
		cfg: cfg, dendrite: dendrite, rsAPI: rsAPI, timers: timers,
		transactions: transactions.New(),
		limits:       newLimits(cfg.RateLimiting),
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
	v3 := router.PathPrefix("/{apiversion:(?:r0|v3)}/").Subrouter()
	send := func(path, method string, f func(*http.Request, *userapi.Device, map[string]string) util.JSONResponse) {
		v3.Handle(path, httputil.MakeAuthAPI("send_message", userAPI,
			func(req *http.Request, device *userapi.Device) util.JSONResponse {
				vars, err := httputil.URLDecodeMapValues(mux.Vars(req))
				if err != nil {
					return util.ErrorResponse(err)
				}
				return f(req, device, vars)
			}, httputil.WithAllowGuests(),
		)).Methods(method, http.MethodOptions)
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

	router.Handle("/v3/expiration/{refresh_method:"+methodRefresh+"|"+methodEnd+"}", a.keepAliveHandler()).
		Methods(http.MethodPut, http.MethodOptions)
}

// keepAliveHandler is what Dendrite's MakeExternalAPI would make, but for the limits of the body, in size and time, and
// that it is not traced, see untraced.
func (a *API) keepAliveHandler() http.Handler {
	handler := util.MakeJSONAPI(util.NewJSONRequestHandler(a.keepAlive))
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		trace, ctx := internal.StartTask(req.Context(), "expiration_keep_alive")
		defer trace.EndTask()
		// The time is for the body alone: a deadline that passes later would cancel the request. Not every
		// ResponseWriter has deadlines; the size is limited in any case.
		control := http.NewResponseController(w)
		_ = control.SetReadDeadline(time.Now().Add(keepAliveReadTimeout))
		body, err := io.ReadAll(http.MaxBytesReader(w, req.Body, maxKeepAliveSize))
		if err == nil { // else net/http goes on to read what is left of the body, and must not wait for it for ever
			_ = control.SetReadDeadline(time.Time{})
		}
		req = req.WithContext(ctx)
		req.Body = readAlready(body, err)
		handler(w, req)
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

// readAlready returns a body that reads as the original did: these bytes, and then this error, if any.
func readAlready(body []byte, err error) io.ReadCloser {
	if err == nil {
		return io.NopCloser(bytes.NewReader(body))
	}
	return io.NopCloser(io.MultiReader(bytes.NewReader(body), errorReader{err}))
}

type errorReader struct{ err error }

func (r errorReader) Read([]byte) (int, error) { return 0, r.err }
