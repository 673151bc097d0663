package clientapi

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// The stable and unstable paths answer differently where the accepted text of MSC4140 and today's clients disagree.
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
		{"cancel", failed, 409, 404, [2]string{"M_UNKNOWN", "M_NOT_FOUND"}},
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
		check(do(newPlanned(&planner{err: test.err}, 1), "POST", unstablePath+"/delayed_events/"+delayID, body, false), test.unstable, test.errcode[1])
	}
	for body, code := range map[string]string{`{}`: "M_MISSING_PARAM", `{"action":5}`: "M_MISSING_PARAM", ``: "M_NOT_JSON", `[]`: "M_BAD_JSON"} {
		w := do(newPlanned(&planner{}, 1), "POST", unstablePath+"/delayed_events/"+delayID, body, false)
		require.Equal(t, http.StatusBadRequest, w.Code)
		require.Equal(t, code, errcode(w))
	}
}

func TestActionsAreLimited(t *testing.T) {
	handler := newPlanned(&planner{}, 1)
	for _, id := range []string{delayID, "guess"} {
		for n := range 3 {
			w := do(handler, "POST", unstablePath+"/delayed_events/"+id+"/restart", "", false)
			require.Equal(t, n == 2, w.Code == http.StatusTooManyRequests, w.Body)
		}
	}
}
