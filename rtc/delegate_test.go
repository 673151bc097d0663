package rtc

import (
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

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

// leavePaths are the paths of delegate_delayed_leave.
var leavePaths = []string{"/v1/rtc/livekit/delegate_delayed_leave", "/unstable/io.element.msc4195/rtc/livekit/delegate_delayed_leave"}

var leaveBody = with(aliceBody, JSON{"delay_id": "delay"})

// A user who is joined hands over a leave event, on both paths, with the participant that get_token has made the token for.
func TestDelegateLeave(t *testing.T) {
	for name, test := range map[string]struct {
		user     string
		changes  JSON
		id       string
		identity string
	}{
		"Newest": {"@alice:a.example", JSON{}, "abc", livekit.Identity("@alice:a.example", "abc")},
		"Older": {
			"@alice:a.example", JSON{"member_id": nil, "member": JSON{"id": "abc", "claimed_device_id": "DEV"}}, "abc",
			livekit.Identity("@alice:a.example", "DEV", "abc"),
		},
		"Plain":      {"@alice:a.example", JSON{"member_id": "@alice:a.example:DEV"}, "@alice:a.example:DEV", "@alice:a.example:DEV"},
		"Guest":      {"@7:a.example", JSON{}, "abc", livekit.Identity("@7:a.example", "abc")},
		"Slash":      {"@alice:a.example", JSON{"url": sfuURL + "/"}, "abc", livekit.Identity("@alice:a.example", "abc")},
		"MoreFields": {"@alice:a.example", JSON{"user_id": "@bob:a.example", "x": 1}, "abc", livekit.Identity("@alice:a.example", "abc")},
	} {
		t.Run(name, func(t *testing.T) {
			for _, path := range leavePaths {
				w := newWorld(t, nil)
				a := w.ask(path, test.user, with(leaveBody, test.changes))
				require.Equal(t, http.StatusOK, a.Code, a.Body)
				require.JSONEq(t, `{}`, a.Body.String())
				require.Equal(t, []Leave{{
					UserID: test.user, RoomID: roomID, DelayID: "delay",
					MemberKey:   member{userID: test.user, roomID: roomID, slotID: slotID, id: test.id}.key(),
					Participant: livekit.Participant{Room: livekit.RoomName(roomID, slotID), Identity: test.identity},
				}}, w.keeper.leaves)
				require.Empty(t, w.keeper.remembered)
				require.Empty(t, w.sfu.rooms)
			}
		})
	}
}

func TestDelegateLeaveErrors(t *testing.T) {
	w := newWorld(t, nil)
	for name, test := range faults { // those of get_token
		t.Run(name, func(t *testing.T) {
			body := test.body
			if changes, ok := body.(JSON); ok {
				body = with(leaveBody, changes)
			}
			refused(t, w.ask(leavePaths[0], "@alice:a.example", body), http.StatusBadRequest, test.errcode)
		})
	}
	for name, test := range map[string]struct {
		user    string
		changes JSON
		status  int
		errcode string
	}{
		"NoToken":         {"", JSON{}, http.StatusUnauthorized, "M_MISSING_TOKEN"},
		"WrongToken":      {"wrong", JSON{}, http.StatusUnauthorized, "M_UNKNOWN_TOKEN"},
		"NoDelayID":       {"@alice:a.example", JSON{"delay_id": nil}, http.StatusBadRequest, "M_MISSING_PARAM"},
		"DelayIDIsNumber": {"@alice:a.example", JSON{"delay_id": 5}, http.StatusBadRequest, "M_BAD_JSON"},
		"LongDelayID":     {"@alice:a.example", JSON{"delay_id": strings.Repeat("x", 256)}, http.StatusBadRequest, "M_INVALID_PARAM"},
		"AnothersDevice":  {"@alice:a.example", JSON{"member_id": "@alice:a.example:8448:DEV"}, http.StatusBadRequest, "M_INVALID_PARAM"},
		"NotJoined":       {"@erin:a.example", JSON{}, http.StatusForbidden, "M_FORBIDDEN"},
		"NotJoinedFirst":  {"@erin:a.example", JSON{"url": otherSFU}, http.StatusForbidden, "M_FORBIDDEN"},
		"UnknownRoom":     {"@alice:a.example", JSON{"room_id": "!unknown:a.example"}, http.StatusForbidden, "M_FORBIDDEN"},
		"MalformedRoom":   {"@alice:a.example", JSON{"room_id": "room"}, http.StatusForbidden, "M_FORBIDDEN"},
		"Large":           {"@alice:a.example", JSON{"x": strings.Repeat("x", maxBody)}, http.StatusRequestEntityTooLarge, "M_TOO_LARGE"},
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, w.ask(leavePaths[0], test.user, with(leaveBody, test.changes)), test.status, test.errcode)
		})
	}
	require.Empty(t, w.keeper.leaves, "nothing was handed over")
}

// A delay ID that cannot be taken is the client's fault, with another code for each API. Everything else is a fault of the server: a client
// that took it for its own would disown a leave event that is an hour away.
func TestLeavesThatAreNotTaken(t *testing.T) {
	for name, test := range map[string]struct {
		err              error
		status           int
		errcode, service string
	}{
		"NotScheduled": {fmt.Errorf("looking: %w", ErrNotScheduled), http.StatusBadRequest, "M_INVALID_PARAM", "M_BAD_JSON"},
		"Crowded":      {ErrCrowded, http.StatusTooManyRequests, "M_LIMIT_EXCEEDED", "M_LIMIT_EXCEEDED"},
		"TimersAway":   {errAway, http.StatusInternalServerError, "M_UNKNOWN", "M_UNKNOWN"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(w *world) { w.keeper.err = test.err; w.parts.Participants = nil })
			refused(t, w.ask(leavePaths[0], "@alice:a.example", leaveBody), test.status, test.errcode)
			for _, path := range []string{"/get_token", "/delegate_delayed_leave"} {
				refused(t, w.askService(path, with(serviceBody, delay)), test.status, test.service)
			}
		})
	}
	w := newWorld(t, func(w *world) { w.rooms.err = errAway })
	refused(t, w.ask(leavePaths[0], "@alice:a.example", leaveBody), http.StatusInternalServerError, "M_UNKNOWN")
}

// Each user may hand over only so often, however many tokens it gets. Application services are exempt.
func TestDelegateLeaveIsLimited(t *testing.T) {
	w := newWorld(t, func(w *world) { w.cfg.UserRequests = limits.Rate{Threshold: 1, Cooloff: time.Hour} })
	require.Equal(t, http.StatusOK, w.ask(paths[0], "@alice:a.example", aliceBody).Code)
	for i, want := range []int{http.StatusOK, http.StatusTooManyRequests} {
		require.Equal(t, want, w.ask(leavePaths[i], "@alice:a.example", leaveBody).Code)
		require.Equal(t, want, w.ask(leavePaths[i], "@bob:a.example", leaveBody).Code)
		require.Equal(t, http.StatusOK, w.ask(leavePaths[i], "@service:a.example", leaveBody).Code)
	}
	a := w.ask(leavePaths[0], "@alice:a.example", "")
	refused(t, a, http.StatusTooManyRequests, "M_LIMIT_EXCEEDED")
	require.NotEmpty(t, a.Header().Get("Retry-After"))
}

// Tokens have limits of their own, but there are many of them. So each user may hand over only so often.
func TestDelegateTokenIsLimited(t *testing.T) {
	w := newWorld(t, func(w *world) { w.cfg.UserRequests = limits.Rate{Threshold: 1, Cooloff: time.Hour} })
	hand := func(token byte) error {
		return w.tokens.DelegateToken(t.Context(), [32]byte{token}, []byte(`{"device_id":"DEV"}`))
	}
	require.NoError(t, hand(1))
	var limited *webapi.RateError
	require.ErrorAs(t, hand(2), &limited)
	require.Positive(t, limited.RetryAfter)
}

// Element Call takes any answer but 404 for a promise. It asks without an access token, and so may browsers, before.
func TestDelegateLeaveIsThereOnlyIfItWorks(t *testing.T) {
	without := newWorld(t, func(w *world) { w.parts.Delegations = nil })
	for _, path := range leavePaths {
		for method, status := range map[string]int{
			"POST": http.StatusUnauthorized, "OPTIONS": http.StatusOK, "GET": http.StatusMethodNotAllowed, "PUT": http.StatusMethodNotAllowed,
		} {
			ask := func(w *world) answer {
				return w.serve(w.routers.Client, httptest.NewRequest(method, "/_matrix/client"+path, nil))
			}
			there := ask(newWorld(t, nil))
			require.Equal(t, status, there.Code, "%s %s", method, path)
			require.Equal(t, "*", there.Header().Get("Access-Control-Allow-Origin"))
			refused(t, ask(without), http.StatusNotFound, "M_UNRECOGNIZED")
		}
		federation := newWorld(t, nil).askAs("b.example", path, with(leaveBody, JSON{"user_id": "@carol:b.example"}))
		require.Equal(t, http.StatusNotFound, federation.Code, "only users of this server have timers here")
	}
}

// The participant is made of the user and the room of the timer, whatever the request says.
func TestDelegateToken(t *testing.T) {
	for name, test := range map[string]struct{ body, slot, identity string }{
		"Member":      {`"slot_id":"s","member_id":"xyz"`, "s", livekit.Identity("@alice:a.example", "xyz")},
		"Plain":       {`"slot_id":"s","member_id":"@alice:a.example:DEV"`, "s", "@alice:a.example:DEV"},
		"NotPlain":    {`"slot_id":"s","member_id":"@bob:a.example:DEV"`, "s", livekit.Identity("@alice:a.example", "@bob:a.example:DEV")},
		"Device":      {`"device_id":"DEV"`, slotID, "@alice:a.example:DEV"},
		"DeviceSlot":  {`"device_id":"DEV","slot_id":"m.call#room"`, slotID, "@alice:a.example:DEV"},
		"Both":        {`"slot_id":"s","member_id":"xyz","device_id":"DEV"`, "s", livekit.Identity("@alice:a.example", "DEV", "xyz")},
		"BothPlain":   {`"slot_id":"s","member_id":"@alice:a.example:1:x","device_id":"DEV"`, "s", livekit.Identity("@alice:a.example", "DEV", "@alice:a.example:1:x")},
		"URL":         {`"device_id":"DEV","url":"` + sfuURL + `"`, slotID, "@alice:a.example:DEV"},
		"Slash":       {`"device_id":"DEV","url":"` + sfuURL + `/"`, slotID, "@alice:a.example:DEV"},
		"Null":        {`"device_id":"DEV","url":null,"member_id":null`, slotID, "@alice:a.example:DEV"},
		"OtherFields": {`"device_id":"DEV","user_id":"@bob:a.example","room_id":"!x:a.example"`, slotID, "@alice:a.example:DEV"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			require.NoError(t, w.tokens.DelegateToken(t.Context(), [32]byte{1}, []byte("{"+test.body+"}")))
			require.Equal(t, []livekit.Participant{{Room: livekit.RoomName(roomID, test.slot), Identity: test.identity}}, w.keeper.tokens)
		})
	}
}

func TestDelegateTokenErrors(t *testing.T) {
	for name, test := range map[string]struct {
		body    string
		errcode spec.MatrixErrorCode
	}{
		"NotJSON":          {`{`, spec.ErrorNotJSON},
		"NoObject":         {`[]`, spec.ErrorBadJSON},
		"Nobody":           {`{"slot_id":"s"}`, spec.ErrorMissingParam},
		"Empty":            {`{"slot_id":"s","member_id":""}`, spec.ErrorMissingParam},
		"NoSlot":           {`{"member_id":"xyz"}`, spec.ErrorMissingParam},
		"NoSlotWithDevice": {`{"member_id":"xyz","device_id":"DEV"}`, spec.ErrorMissingParam},
		"MemberIsNumber":   {`{"slot_id":"s","member_id":5}`, spec.ErrorBadJSON},
		"DeviceIsObject":   {`{"slot_id":"s","device_id":{}}`, spec.ErrorBadJSON},
		"SlotIsNumber":     {`{"slot_id":5,"device_id":"DEV"}`, spec.ErrorBadJSON},
		"URLIsNumber":      {`{"device_id":"DEV","url":5}`, spec.ErrorBadJSON},
		"LongMember":       {`{"slot_id":"s","member_id":"` + strings.Repeat("x", 256) + `"}`, spec.ErrorInvalidParam},
		"NUL":              {`{"device_id":"\u0000"}`, spec.ErrorInvalidParam},
		"NotOurs":          {`{"device_id":"DEV","url":"` + otherSFU + `"}`, spec.ErrorInvalidParam},
		"AnothersDevice":   {`{"device_id":"8448:DEV"}`, spec.ErrorInvalidParam},
		"AnothersMember":   {`{"slot_id":"s","member_id":"@alice:a.example:8448:DEV"}`, spec.ErrorInvalidParam},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			var refusal *webapi.RequestError
			require.ErrorAs(t, w.tokens.DelegateToken(t.Context(), [32]byte{1}, []byte(test.body)), &refusal)
			require.Equal(t, http.StatusBadRequest, refusal.Code)
			require.Equal(t, test.errcode, refusal.ErrCode)
			require.Empty(t, w.keeper.tokens)
		})
	}
	delegate := func(err error) error {
		w := newWorld(t, func(w *world) { w.keeper.err = err })
		return w.tokens.DelegateToken(t.Context(), [32]byte{1}, []byte(`{"device_id":"DEV"}`))
	}
	var refusal *webapi.RequestError
	require.ErrorAs(t, delegate(fmt.Errorf("looking: %w", ErrTooShort)), &refusal)
	require.Equal(t, spec.ErrorInvalidParam, refusal.ErrCode)
	unknown := errors.New("no such timer")
	require.ErrorIs(t, delegate(unknown), unknown)
}

// Neither delay IDs nor access tokens are logged, whatever the answer and the log level are.
func TestDelegatedLeavesAreNotLogged(t *testing.T) {
	var log strings.Builder
	level, out := logrus.GetLevel(), logrus.StandardLogger().Out
	defer func() { logrus.SetLevel(level); logrus.SetOutput(out) }()
	logrus.SetOutput(&log)
	logrus.SetLevel(logrus.TraceLevel)
	t.Setenv("DENDRITE_TRACE_HTTP", "1")
	body := with(leaveBody, JSON{"delay_id": "secret-delay"})
	for _, err := range []error{nil, ErrNotScheduled, errAway} {
		w := newWorld(t, func(w *world) { w.keeper.err = err; w.parts.Participants = nil })
		w.ask(leavePaths[0], "@alice:a.example", body)
		w.ask(leavePaths[0], "secret-token", body)
		w.askService("/delegate_delayed_leave", with(serviceBody, with(delay, JSON{"delay_id": "secret-delay"})))
	}
	require.Contains(t, log.String(), errAway.Error())
	require.NotContains(t, log.String(), "secret")
}
