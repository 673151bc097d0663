package clientapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

// atOnce is a fake Keeper and Delegator that knows one token. It calls do for every action.
type atOnce struct{ do func() error }

func (a atOnce) Allow(h expiration.TokenHash) (bool, time.Duration) {
	return h == expiration.HashToken(knownToken), 0
}
func (a atOnce) Refresh(context.Context, expiration.TokenHash) error   { return a.do() }
func (a atOnce) End(context.Context, expiration.TokenHash) error       { return a.do() }
func (a atOnce) DelegateToken(context.Context, [32]byte, []byte) error { return a.do() }

const knownToken = "k0QmcyYpC3XbGkEvTqPIxvCZ5Vd1m2VZJxXkq2y7S_A"

// newEndpoint returns the endpoint in two forms: as Dendrite's routers serve it, and behind KeepAlivesFirst.
func newEndpoint(do func() error) (a *API, routed, first http.Handler) {
	return newEndpointOf(Config{}, Timers{Keeper: atOnce{do}, Delegator: atOnce{do}})
}

func newEndpointOf(cfg Config, timers Timers) (a *API, routed, first http.Handler) {
	a = New(cfg, &config.ClientAPI{}, nil, timers)
	routers := httputil.NewRouters()
	a.AddRoutes(routers.Client, nil)
	return a, routers.Client, a.KeepAlivesFirst(routers.Client)
}

func body(token string) string { return fmt.Sprintf(`{"expire_refresh_token":%q}`, token) }

// KeepAlivesFirst changes neither answers nor metrics, at any log level.
func TestKeepAlivesFirst(t *testing.T) {
	defer logrus.SetLevel(logrus.GetLevel())
	defer logrus.SetOutput(logrus.StandardLogger().Out)
	logrus.SetOutput(io.Discard)
	const path = "/_matrix/client/v3/expiration/"
	for _, test := range []struct {
		method, path, body string
		err                error
		code               int
		result             string
	}{
		{"PUT", path + "refresh", body(knownToken), nil, 200, "ok"},
		{"PUT", path + "end", body(knownToken), nil, 200, "ok"},
		{"PUT", path + "delegate", body(knownToken), nil, 200, "ok"},
		{"PUT", path + "delegate", body(knownToken), expiration.ErrNotFound, 404, "not_found"},
		{"PUT", path + "delegate", body(knownToken), webapi.BadRequest(spec.InvalidParam("url")), 400, "bad_request"},
		{"PUT", path + "refresh?x=y", body(knownToken), nil, 200, "ok"},
		{"PUT", path + "refresh", body("guess"), nil, 404, "not_found"},
		{"PUT", path + "refresh", body(knownToken), expiration.ErrNotFound, 404, "not_found"},
		{"PUT", path + "end", body(knownToken), &expiration.DropError{}, 403, "forbidden"},
		{"PUT", path + "refresh", body(knownToken), errors.New("disk full"), 500, "error"},
		{"PUT", path + "refresh", `{}`, nil, 400, "bad_request"},
		{"PUT", path + "refresh", strings.Repeat(" ", 4095) + `{}`, nil, 413, "bad_request"},
		{"OPTIONS", path + "refresh", body(knownToken), nil, 200, ""},
		{"GET", path + "refresh", "", nil, 405, ""},
		{"POST", path + "end", body(knownToken), nil, 405, ""},
		{"put", path + "refresh", body(knownToken), nil, 405, ""},
		{"POST", path + "delegate", body(knownToken), nil, 405, ""},
		{"PUT", path + "refres%68", body(knownToken), nil, 404, ""},
		{"PUT", path + "refresh%2F", body(knownToken), nil, 404, ""},
		{"PUT", path + "refresh/", body(knownToken), nil, 404, ""},
		{"PUT", path + "/refresh", body(knownToken), nil, 404, ""},
		{"PUT", path + "expire", body(knownToken), nil, 404, ""},
		{"PUT", path, body(knownToken), nil, 404, ""},
	} {
		for _, level := range []logrus.Level{logrus.InfoLevel, logrus.TraceLevel} {
			logrus.SetLevel(level)
			a, routed, first := newEndpoint(func() error { return test.err })
			var answers [2]*httptest.ResponseRecorder
			for i, handler := range []http.Handler{routed, first} {
				answers[i] = httptest.NewRecorder()
				handler.ServeHTTP(answers[i], httptest.NewRequest(test.method, test.path, strings.NewReader(test.body)))
			}
			require.Equal(t, test.code, answers[0].Code, "%s %s", test.method, test.path)
			require.Equal(t, answers[0].Code, answers[1].Code, "%s %s", test.method, test.path)
			require.Equal(t, answers[0].Body.String(), answers[1].Body.String())
			require.Equal(t, answers[0].Header(), answers[1].Header())
			require.Equal(t, "*", answers[1].Header().Get("Access-Control-Allow-Origin"))
			var counted []string
			for _, method := range []string{"refresh", "end", "delegate"} {
				for _, result := range []string{"ok", "not_found", "forbidden", "limited", "bad_request", "error"} {
					for range int(testutil.ToFloat64(a.metrics.keepAlives.WithLabelValues(method, result))) {
						counted = append(counted, method+" "+result)
					}
				}
			}
			if test.result == "" {
				require.Empty(t, counted)
				continue
			}
			method, _, _ := strings.Cut(strings.TrimPrefix(test.path, path), "?")
			require.Equal(t, []string{method + " " + test.result, method + " " + test.result}, counted)
		}
	}
}

// A panic is answered, and logged without the token.
func TestPanickingKeepAlive(t *testing.T) {
	var log strings.Builder
	defer logrus.SetOutput(logrus.StandardLogger().Out)
	logrus.SetOutput(&log)
	for _, method := range []string{"refresh", "end", "delegate"} {
		_, _, first := newEndpoint(panics)
		w := httptest.NewRecorder()
		first.ServeHTTP(w, httptest.NewRequest(http.MethodPut, "/_matrix/client/v3/expiration/"+method, strings.NewReader(body(knownToken))))
		require.Equal(t, http.StatusInternalServerError, w.Code)
	}
	require.Equal(t, 3, strings.Count(log.String(), "Request panicked!"))
	require.Contains(t, log.String(), "clientapi.panics", "the stack")
	require.NotContains(t, log.String(), knownToken)
}

func panics() error { panic("by order") }

// FuzzReadToken checks that parseToken understands every body as encoding/json does: it returns the token, or the right Matrix error.
func FuzzReadToken(f *testing.F) {
	for _, seed := range []string{
		`{"expire_refresh_token":"x"}`, `{"expire_refresh_token":null}`, `{}`, `null`, `[]`, ``, `{"expire_refresh_token":"\ud800"}`,
		`{"expire_refresh_token":"x","expire_refresh_token":5}`, ` { "a" : [ 1.5e-3 , true ] , "expire_refresh_token" : "\"" } `,
		`{"\u0065xpire_refresh_token":"x"}`, `{"a":{"expire_refresh_token":"x"}}`, "{\"expire_refresh_token\":\"\u00fc\"}",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, body string) {
		token, err := parseToken([]byte(body))
		var fields map[string]json.RawMessage
		var want *string
		var code spec.MatrixErrorCode
		switch valid := utf8.ValidString(body) && json.Valid([]byte(body)); {
		case !valid:
			code = spec.ErrorNotJSON
		case json.Unmarshal([]byte(body), &fields) != nil || fields == nil:
			code = spec.ErrorBadJSON
		case fields[tokenKey] == nil:
			code = spec.ErrorMissingParam
		case json.Unmarshal(fields[tokenKey], &want) != nil || want == nil:
			code = spec.ErrorBadJSON
		}
		var refused *webapi.RequestError
		switch {
		case code != "":
			if !errors.As(err, &refused) || refused.ErrCode != code || token != "" {
				t.Fatalf("%q, %v, and not %s", token, err, code)
			}
		case err != nil || token != *want:
			t.Fatalf("%q, %v, and not %q", token, err, *want)
		}
	})
}

// discard is a ResponseWriter that discards the answer and takes almost no time.
type discard struct{ header http.Header }

func (d *discard) Header() http.Header             { return d.header }
func (d *discard) Write(p []byte) (int, error)     { return len(p), nil }
func (d *discard) WriteHeader(int)                 {}
func (d *discard) SetReadDeadline(time.Time) error { return nil }

// BenchmarkKeepAlive compares the cost of a refresh with that of an endpoint that only decodes and encodes the same JSON. It excludes the
// engine and net/http.
func BenchmarkKeepAlive(b *testing.B) {
	defer logrus.SetLevel(logrus.GetLevel())
	logrus.SetLevel(logrus.InfoLevel)
	_, routed, first := newEndpoint(func() error { return nil })
	bare := http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		var body struct {
			Token string `json:"expire_refresh_token"`
		}
		_ = json.NewDecoder(req.Body).Decode(&body)
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(struct{}{})
	})
	for _, endpoint := range []struct {
		name    string
		handler http.Handler
	}{{"Bare", bare}, {"First", first}, {"Routed", routed}} {
		b.Run(endpoint.name, func(b *testing.B) {
			req := httptest.NewRequest(http.MethodPut, "/_matrix/client/v3/expiration/refresh", nil)
			body := strings.NewReader(body(knownToken))
			req.Body = io.NopCloser(body)
			b.ReportAllocs()
			for b.Loop() {
				_, _ = body.Seek(0, io.SeekStart)
				endpoint.handler.ServeHTTP(&discard{http.Header{}}, req)
			}
		})
	}
}
