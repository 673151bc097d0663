package clientapi

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

const delegatePath = "/_matrix/client/v3/expiration/delegate"

// sfu is a fake Keeper that knows one token, and limits it to two requests, and a fake Delegator.
type sfu struct {
	atOnce
	asked  expiration.Bucket
	tokens [][32]byte
	bodies []string
	err    error
}

func (s *sfu) Allow(h expiration.TokenHash) (bool, time.Duration) {
	if h != expiration.HashToken(knownToken) {
		return false, 0
	}
	return true, s.asked.Take(twice, time.Hour)
}

func (s *sfu) DelegateToken(_ context.Context, token [32]byte, body []byte) error {
	s.tokens, s.bodies = append(s.tokens, token), append(s.bodies, string(body))
	return s.err
}

// delegate returns a function that sends a request to the endpoint from an address.
func (s *sfu) delegate() func(body, from string) *httptest.ResponseRecorder {
	_, _, first := newEndpointOf(Config{UnknownTokens: twice}, Timers{Keeper: s, Delegator: s})
	return func(body, from string) *httptest.ResponseRecorder {
		req := httptest.NewRequest(http.MethodPut, delegatePath, strings.NewReader(body))
		req.RemoteAddr = from + ":1"
		w := httptest.NewRecorder()
		first.ServeHTTP(w, req)
		return w
	}
}

// The Delegator gets the hash of the token, and the body as it is.
func TestDelegate(t *testing.T) {
	s := &sfu{}
	body := fmt.Sprintf(`{"expire_refresh_token":%q,"slot_id":"m.call#ROOM","member_id":"xyz"}`, knownToken)
	w := s.delegate()(body, "192.0.2.1")
	require.Equal(t, http.StatusOK, w.Code, w.Body)
	require.JSONEq(t, `{}`, w.Body.String())
	require.Equal(t, [][32]byte{expiration.HashToken(knownToken)}, s.tokens)
	require.Equal(t, []string{body}, s.bodies)
}

// What is wrong with the token is answered as for keep-alives, and nothing is handed over.
func TestDelegateErrors(t *testing.T) {
	for name, test := range map[string]struct {
		body    string
		err     error
		code    int
		errcode string
	}{
		"NotJSON":       {`{"slot_id":`, nil, http.StatusBadRequest, "M_NOT_JSON"},
		"NoObject":      {`[]`, nil, http.StatusBadRequest, "M_BAD_JSON"},
		"NoToken":       {`{"slot_id":"m.call#ROOM"}`, nil, http.StatusBadRequest, "M_MISSING_PARAM"},
		"TokenIsNumber": {`{"expire_refresh_token":5}`, nil, http.StatusBadRequest, "M_BAD_JSON"},
		"Unknown":       {body("guess"), nil, http.StatusNotFound, "M_NOT_FOUND"},
		"Large":         {body(knownToken) + strings.Repeat(" ", maxKeepAliveSize), nil, http.StatusRequestEntityTooLarge, "M_TOO_LARGE"},
		"Closed":        {body(knownToken), fmt.Errorf("looking: %w", expiration.ErrNotFound), http.StatusNotFound, "M_NOT_FOUND"},
		"OfDelegator":   {body(knownToken), webapi.BadRequest(spec.InvalidParam("url")), http.StatusBadRequest, "M_INVALID_PARAM"},
		"Fault":         {body(knownToken), errors.New("disk full"), http.StatusInternalServerError, "M_UNKNOWN"},
	} {
		t.Run(name, func(t *testing.T) {
			s := &sfu{err: test.err}
			w := s.delegate()(test.body, "192.0.2.1")
			require.Equal(t, test.code, w.Code, w.Body)
			require.Equal(t, test.errcode, errcode(w))
			require.Equal(t, "*", w.Header().Get("Access-Control-Allow-Origin"))
			require.Equal(t, test.err != nil, len(s.bodies) > 0)
		})
	}
}

// The limits are those of keep-alives: by token, and for unknown tokens by address.
func TestDelegateIsLimited(t *testing.T) {
	s := &sfu{}
	delegate := s.delegate()
	for _, want := range []int{http.StatusOK, http.StatusOK, http.StatusTooManyRequests} {
		require.Equal(t, want, delegate(body(knownToken), "192.0.2.1").Code)
	}
	w := delegate(body(knownToken), "192.0.2.2")
	require.Equal(t, http.StatusTooManyRequests, w.Code, "the address does not matter")
	require.Equal(t, "M_LIMIT_EXCEEDED", errcode(w))
	require.NotEmpty(t, w.Header().Get("Retry-After"))
	require.Len(t, s.bodies, 2)
	for _, want := range []int{http.StatusNotFound, http.StatusNotFound, http.StatusTooManyRequests} {
		require.Equal(t, want, delegate(body("guess"), "192.0.2.1").Code)
	}
	require.Equal(t, http.StatusNotFound, delegate(body("guess"), "192.0.2.2").Code)
}

// A server without an SFU answers the path as one that it does not know, with any method. So clients find out.
func TestDelegateIsThereOnlyIfItWorks(t *testing.T) {
	a, routed, first := newEndpointOf(Config{}, Timers{Keeper: atOnce{func() error { return nil }}})
	require.NotContains(t, a.keepAlives(), methodDelegate)
	for _, handler := range []http.Handler{routed, first} {
		for _, method := range []string{"PUT", "POST", "GET", "OPTIONS"} {
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, httptest.NewRequest(method, delegatePath, strings.NewReader(body(knownToken))))
			require.Equal(t, http.StatusNotFound, w.Code, method)
			require.Equal(t, "M_UNRECOGNIZED", errcode(w))
			require.Equal(t, "*", w.Header().Get("Access-Control-Allow-Origin"))
		}
	}
}

// A token is not logged, whatever the answer and the log level are.
func TestDelegatedTokensAreNotLogged(t *testing.T) {
	var log strings.Builder
	level, out := logrus.GetLevel(), logrus.StandardLogger().Out
	defer func() { logrus.SetLevel(level); logrus.SetOutput(out) }()
	logrus.SetOutput(&log)
	t.Setenv("DENDRITE_TRACE_HTTP", "1")
	for _, logrusLevel := range []logrus.Level{logrus.InfoLevel, logrus.TraceLevel} {
		logrus.SetLevel(logrusLevel)
		for _, err := range []error{nil, expiration.ErrNotFound, errors.New("disk full")} {
			delegate := (&sfu{err: err}).delegate()
			delegate(body(knownToken), "192.0.2.1")
			delegate(body("guess-of-a-token"), "192.0.2.1")
			delegate(`{"expire_refresh_token":"`+knownToken+`"`, "192.0.2.1")
		}
	}
	require.Contains(t, log.String(), "disk full")
	require.NotContains(t, log.String(), knownToken)
	require.NotContains(t, log.String(), "guess-of-a-token")
}
