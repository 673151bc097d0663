package clientapi

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// The stable and unstable paths answer differently where the merged text of MSC4140 and today's clients disagree.
func TestActions(t *testing.T) {
	sent := &expiration.FinalisedError{Final: expiration.Final{EventID: "$x"}}
	cancelled := &expiration.FinalisedError{}
	failed := &expiration.FinalisedError{Final: expiration.Final{Error: json.RawMessage(`{}`)}}
	refused := &expiration.RefusedError{Code: 403, Response: json.RawMessage(`{"errcode":"M_FORBIDDEN","error":"no"}`)}
	for _, test := range []struct {
		action           string
		err              error
		stable, unstable int
		errcode          [2]string
	}{
		{"restart", nil, 200, 200, [2]string{}},
		{"send", nil, 200, 200, [2]string{}},
		{"cancel", nil, 200, 200, [2]string{}},
		{"restart", sent, 409, 404, [2]string{"M_UNKNOWN", "M_NOT_FOUND"}},
		{"restart", cancelled, 409, 404, [2]string{"M_UNKNOWN", "M_NOT_FOUND"}},
		{"restart", failed, 409, 404, [2]string{"M_UNKNOWN", "M_NOT_FOUND"}},
		{"send", sent, 200, 200, [2]string{}},
		{"send", cancelled, 409, 404, [2]string{"M_UNKNOWN", "M_NOT_FOUND"}},
		{"send", failed, 409, 404, [2]string{"M_UNKNOWN", "M_NOT_FOUND"}},
		{"cancel", sent, 409, 404, [2]string{"M_UNKNOWN", "M_NOT_FOUND"}},
		{"cancel", cancelled, 200, 200, [2]string{}},
		{"cancel", failed, 200, 200, [2]string{}}, // the text counts an error as a cancellation
		{"send", refused, 403, 403, [2]string{"M_FORBIDDEN", "M_FORBIDDEN"}},
		{"restart", expiration.ErrNotFound, 404, 404, [2]string{"M_NOT_FOUND", "M_NOT_FOUND"}},
		{"restart", errors.New("disk full"), 500, 500, [2]string{"M_UNKNOWN", "M_UNKNOWN"}},
		{"delete", nil, 404, 404, [2]string{"M_UNRECOGNIZED", "M_UNRECOGNIZED"}},
	} {
		check := func(w *httptest.ResponseRecorder, code int, wanted string) {
			t.Helper()
			require.Equal(t, code, w.Code, "%s %v: %s", test.action, test.err, w.Body)
			require.Equal(t, wanted, errcode(w))
			if code == http.StatusOK {
				require.JSONEq(t, `{}`, w.Body.String())
			}
		}
		for _, body := range []string{"", "{}"} {
			p := &planner{err: test.err}
			check(do(newPlanned(p, 1), "POST", stablePath+"/delayed_events/"+delayID+"/"+test.action, body, true), test.stable, test.errcode[0])
			check(do(newPlanned(p, 1), "POST", unstablePath+"/delayed_events/"+delayID+"/"+test.action, body, false), test.unstable, test.errcode[1])
			if test.action != "delete" {
				require.Equal(t, []string{test.action + " @alice:localhost", test.action + " "}, p.acts)
			}
			w := do(newPlanned(p, 1), "POST", stablePath+"/delayed_events/"+delayID+"/"+test.action, body, false)
			require.Equal(t, http.StatusUnauthorized, w.Code)
		}
		body := `{"action":"` + test.action + `"}`
		if test.action == "delete" { // matrix-js-sdk takes M_UNRECOGNIZED for a server without this form
			test.unstable, test.errcode[1] = 400, "M_INVALID_PARAM"
		}
		check(do(newPlanned(&planner{err: test.err}, 1), "POST", unstablePath+"/delayed_events/"+delayID, body, false), test.unstable, test.errcode[1])
	}
	for body, code := range map[string]string{`{}`: "M_MISSING_PARAM", `{"action":5}`: "M_MISSING_PARAM", ``: "M_NOT_JSON", `[]`: "M_BAD_JSON"} {
		w := do(newPlanned(&planner{}, 1), "POST", unstablePath+"/delayed_events/"+delayID, body, false)
		require.Equal(t, http.StatusBadRequest, w.Code)
		require.Equal(t, code, errcode(w))
	}
}

// An unstable action needs no access token. With a valid one the event must be its owner's.
func TestTokensOfUnstableActions(t *testing.T) {
	for token, owner := range map[string]string{"": "", "expired": "", "token": "@alice:localhost", "service": "@alice:localhost"} {
		for path, body := range map[string]string{"/restart": "", "": `{"action":"restart"}`} {
			p := &planner{}
			w := doWith(newPlanned(p, 1), "POST", unstablePath+"/delayed_events/"+delayID+path, body, token)
			require.Equal(t, http.StatusOK, w.Code, token)
			require.Equal(t, []string{"restart " + owner}, p.acts, token)

			w = doWith(newPlanned(p, 1), "POST", unstablePath+"/delayed_events/"+delayID+path+"?user_id=@foreign:localhost", body, "service")
			require.Equal(t, http.StatusForbidden, w.Code, "an application service that may not act for the user")
			require.Contains(t, w.Body.String(), "M_FORBIDDEN")
			require.Len(t, p.acts, 1)
		}
	}
}

// Actions with an access token count among the user's requests, those of an application service do not.
func TestActionsOfAUserAreLimited(t *testing.T) {
	for token, limited := range map[string]bool{"": false, "token": true, "service": false} {
		a := New(Config{UserRequests: expiration.RateLimit{Threshold: 1, Cooloff: time.Hour}}, &config.ClientAPI{}, rooms{}, (&planner{}).timers())
		routers := httputil.NewRouters()
		a.AddRoutes(routers.Client, dendrite{})
		for n := range 2 {
			w := doWith(routers.Client, "POST", unstablePath+"/delayed_events/"+delayID+"/restart", "", token)
			require.Equal(t, limited && n == 1, w.Code == http.StatusTooManyRequests, "%s %s", token, w.Body)
		}
	}
}

// Actions without an access token count by delay ID, or by address if the ID is unknown. Those with one count by user alone. The ID of a
// finalised event is no guess.
func TestActionsAreLimited(t *testing.T) {
	scheduled, finalised := &planner{}, &planner{err: &expiration.FinalisedError{}}
	for _, test := range []struct {
		timers  *planner
		id      string
		owner   bool
		code    int
		limited bool
	}{
		{scheduled, delayID, false, 200, true},
		{scheduled, delayID, true, 200, false},
		{scheduled, "guess", false, 404, true},
		{scheduled, "guess", true, 404, false},
		{finalised, delayID, false, 404, false},
		{finalised, delayID, true, 404, false},
	} {
		handler := newPlanned(test.timers, 1)
		for n := range 3 {
			w := do(handler, "POST", unstablePath+"/delayed_events/"+test.id+"/restart", "", test.owner)
			want := test.code
			if test.limited && n == 2 {
				want = http.StatusTooManyRequests
			}
			require.Equal(t, want, w.Code, "%+v: %s", test, w.Body)
		}
	}
	// Whoever guesses behind the same proxy makes nobody else wait.
	handler := newPlanned(finalised, 1)
	for range 3 {
		do(handler, "POST", unstablePath+"/delayed_events/guess/restart", "", false)
	}
	require.Equal(t, http.StatusNotFound, do(handler, "POST", unstablePath+"/delayed_events/"+delayID+"/restart", "", false).Code)
}

// Requests without an access token that have the same delay ID are limited, also if its event is finalised.
func TestRequestsWithOneDelayIDAreLimited(t *testing.T) {
	p := &planner{err: &expiration.FinalisedError{}}
	a := New(Config{DelayIDs: expiration.RateLimit{Threshold: 1, Cooloff: time.Hour}}, &config.ClientAPI{}, rooms{}, p.timers())
	routers := httputil.NewRouters()
	a.AddRoutes(routers.Client, dendrite{})
	cancel := func(id string) int {
		return do(routers.Client, "POST", unstablePath+"/delayed_events/"+id+"/cancel", "", false).Code
	}
	require.Equal(t, http.StatusNotFound, cancel("one"))
	require.Equal(t, http.StatusTooManyRequests, cancel("one"))
	require.Equal(t, http.StatusNotFound, cancel("another"))
}
