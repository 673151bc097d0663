package clientapi

import (
	"context"
	"errors"
	"io"
	"net/http"
	"runtime/trace"
	"time"

	"github.com/matrix-org/dendrite/internal"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"
	"github.com/opentracing/opentracing-go"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

const (
	methodRefresh = "refresh"
	methodEnd     = "end"

	// keepAlivePath is the path of the methods, without the prefix of the client API.
	keepAlivePath = "/v3/expiration/"

	// maxKeepAliveSize is the limit for the body of a keep-alive, in bytes.
	maxKeepAliveSize = 4 << 10
	// keepAliveReadTimeout is how long the body may take to arrive.
	keepAliveReadTimeout = 10 * time.Second
	// tokenKey is the field of the token, in requests and answers.
	tokenKey = "expire_refresh_token"
)

// Keeper keeps expiring events alive, and ends them.
type Keeper interface {
	Allow(expiration.TokenHash) (known bool, wait time.Duration)
	Refresh(context.Context, expiration.TokenHash) error
	End(context.Context, expiration.TokenHash) error
}

// tokenMethod does what a request with a token asks for. body is that of the request.
type tokenMethod func(ctx context.Context, h expiration.TokenHash, body []byte) error

// keepAlive answers PUT /_matrix/client/v3/expiration/{refresh_method} for one method. It behaves like a handler of Dendrite's
// MakeExternalAPI, but limits the size and the time of the body, and dumps no requests into the log (see webapi.Untraced). Refreshes are by
// far the most frequent requests, so a successful refresh gets no logger and no request ID unless they would show in the log.
type keepAlive struct {
	api *API
	do  tokenMethod
	// logs: do writes to the request's logger, so the request needs one.
	logs    bool
	results *prometheus.CounterVec
	ok      prometheus.Counter
}

// keepAlives returns the handlers of the methods.
func (a *API) keepAlives() map[string]http.Handler {
	handler := func(method string, do tokenMethod, logs bool) http.Handler {
		results := a.metrics.keepAlives.MustCurryWith(prometheus.Labels{"method": method})
		return &keepAlive{api: a, do: do, logs: logs, results: results, ok: results.WithLabelValues("ok")}
	}
	byHash := func(do func(context.Context, expiration.TokenHash) error) tokenMethod {
		return func(ctx context.Context, h expiration.TokenHash, _ []byte) error { return do(ctx, h) }
	}
	handlers := map[string]http.Handler{
		methodRefresh: handler(methodRefresh, byHash(a.timers.Refresh), false),
		methodEnd:     handler(methodEnd, byHash(a.timers.End), true), // End sends an event, and sending logs
	}
	if a.timers.Delegator != nil {
		handlers[methodDelegate] = handler(methodDelegate, func(ctx context.Context, h expiration.TokenHash, body []byte) error {
			return a.timers.DelegateToken(ctx, h, body)
		}, false)
	}
	return handlers
}

func (k *keepAlive) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if opentracing.IsGlobalTracerRegistered() || trace.IsEnabled() {
		task, ctx := internal.StartTask(req.Context(), "expiration_keep_alive")
		defer task.EndTask()
		req = req.WithContext(ctx)
	}
	token, body, err := readToken(w, req)
	if err != nil || k.logs || req.Method == http.MethodOptions || logrus.IsLevelEnabled(logrus.TraceLevel) {
		k.answer(w, req, token, body, err)
		return
	}
	util.Protect(func(w http.ResponseWriter, req *http.Request) {
		if err := k.keep(req, token, body); err != nil {
			k.answer(w, req, token, body, err)
			return
		}
		k.ok.Inc()
		w.Header().Set("Content-Type", "application/json")
		util.SetCORSHeaders(w)
		_, _ = io.WriteString(w, "{}")
	})(w, req)
}

// answer answers and logs a request as Dendrite does. If err is nil, it first does what the request asks for.
func (k *keepAlive) answer(w http.ResponseWriter, req *http.Request, token string, body []byte, err error) {
	util.MakeJSONAPI(util.NewJSONRequestHandler(func(req *http.Request) util.JSONResponse {
		if err == nil {
			err = k.keep(req, token, body)
		}
		k.results.WithLabelValues(resultOf(err)).Inc()
		if err == nil {
			return util.JSONResponse{Code: http.StatusOK, JSON: struct{}{}}
		}
		return errorResponse(req, err)
	}))(w, req)
}

// resultOf returns the name that the result of a request has in the metrics.
func resultOf(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, new(*webapi.RequestError)):
		return "bad_request"
	case errors.As(err, new(*webapi.RateError)):
		return "limited"
	case errors.Is(err, expiration.ErrNotFound):
		return "not_found"
	case errors.As(err, new(*expiration.DropError)):
		return "forbidden"
	}
	return "error"
}

// keep does what a request asks for, unless a rate limit forbids it.
func (k *keepAlive) keep(req *http.Request, token string, body []byte) error {
	hash := expiration.HashToken(token)
	known, wait := k.api.timers.Allow(hash)
	if !known {
		if err := k.api.guesses.count(req); err != nil {
			return err
		}
		return expiration.ErrNotFound
	}
	if err := webapi.Limited(wait); err != nil {
		return err
	}
	return k.do(req.Context(), hash, body)
}

// readToken returns the token in the body of a request, and the body.
func readToken(w http.ResponseWriter, req *http.Request) (token string, body []byte, err error) {
	body, err = webapi.ReadBody(webapi.BoundBody(w, req.Body, maxKeepAliveSize, keepAliveReadTimeout))
	if err == nil {
		token, err = parseToken(body)
	}
	return token, body, err
}

// parseToken returns the token in the body of a request.
func parseToken(body []byte) (string, error) {
	if err := webapi.CheckObject(body, "The body"); err != nil {
		return "", err
	}
	token := lastField(body, tokenKey)
	switch {
	case !token.Exists():
		return "", webapi.BadRequest(spec.MissingParam(tokenKey + " is missing"))
	case token.Type != gjson.String:
		return "", webapi.BadRequest(spec.BadJSON(tokenKey + " must be a string"))
	}
	return token.Str, nil
}
