package tests

import (
	"net/http"
	"testing"
	"time"

	"github.com/matrix-org/complement"
	"github.com/matrix-org/complement/b"
	"github.com/matrix-org/complement/client"
	"github.com/matrix-org/complement/helpers"
	"github.com/matrix-org/complement/match"
	"github.com/matrix-org/complement/must"
)

func TestExpiringEvents(t *testing.T) {
	deployment := complement.Deploy(t, 1)
	defer deployment.Destroy(t)
	alice := deployment.Register(t, "hs1", helpers.RegistrationOpts{})
	bob := deployment.Register(t, "hs1", helpers.RegistrationOpts{})
	roomID := newRoom(t, alice)
	bob.MustJoinRoom(t, roomID, nil)

	t.Run("an event expires when its time is over", func(t *testing.T) {
		sent := time.Now()
		eventID, token := send(t, alice, messagePath(roomID), short)
		closing := awaitClosing(t, bob, roomID, awaitRunning(t, bob, roomID, eventID), "expired")
		mustNotBeBefore(t, closing, sent.Add(short*time.Second))
		mustBeGone(t, deployment, token)
	})

	t.Run("a refresh starts the time again", func(t *testing.T) {
		eventID, token := send(t, alice, messagePath(roomID), short)
		running := awaitRunning(t, bob, roomID, eventID)
		refreshed := time.Now()
		mustRefresh(t, deployment, token)
		mustNotBeBefore(t, awaitClosing(t, bob, roomID, running, "expired"), refreshed.Add(short*time.Second))
	})

	t.Run("a state event is ended", func(t *testing.T) {
		eventID, token := send(t, alice, statePath(roomID, "ended"), long)
		running := awaitRunning(t, bob, roomID, eventID)
		mustEnd(t, deployment, token)
		content := alice.MustGetStateEventContent(t, roomID, eventType, "ended")
		must.MatchGJSON(t, content, match.JSONKeyEqual(`m\.will_expire`, "ended"))
		awaitClosing(t, bob, roomID, running, "ended")
		mustBeGone(t, deployment, token)
	})

	t.Run("a request that is sent again gets the same event and token", func(t *testing.T) {
		path := messagePath(roomID)
		eventID, token := send(t, alice, path, long)
		again, sameToken := send(t, alice, path, long)
		must.Equal(t, again, eventID, "event ID")
		must.Equal(t, sameToken, token, "token")
	})

	t.Run("state that is replaced does not expire", func(t *testing.T) {
		_, token := send(t, alice, statePath(roomID, "replaced"), short)
		bob.MustDo(t, "PUT", statePath(roomID, "replaced"), client.WithJSONBody(t, object{"topic": "coffee"}))
		mustBeGone(t, deployment, token)
		// The later event expires after the replaced one would have expired.
		later, _ := send(t, alice, messagePath(roomID), short)
		awaitClosing(t, bob, roomID, awaitRunning(t, bob, roomID, later), "expired")
		content := alice.MustGetStateEventContent(t, roomID, eventType, "replaced")
		must.MatchGJSON(t, content, match.JSONKeyEqual("topic", "coffee"))
	})

	t.Run("state that is replaced by an expiring event gets another token", func(t *testing.T) {
		_, first := send(t, alice, statePath(roomID, "restarted"), long)
		alice.MustDo(t, "PUT", statePath(roomID, "restarted"), client.WithJSONBody(t, object{}))
		eventID, second := send(t, alice, statePath(roomID, "restarted"), long)
		mustBeGone(t, deployment, first)
		mustEnd(t, deployment, second)
		awaitClosing(t, bob, roomID, awaitRunning(t, bob, roomID, eventID), "ended")
	})

	t.Run("an event without the field is an ordinary event", func(t *testing.T) {
		res := alice.MustDo(t, "PUT", messagePath(roomID), client.WithJSONBody(t, object{"topic": "tea"}))
		body := must.ParseJSON(t, res.Body)
		must.MatchGJSON(t, body, match.JSONKeyPresent("event_id"))
		must.MatchGJSON(t, body, match.JSONKeyMissing("expire_refresh_token"))
	})
}

func TestExpiringEventErrors(t *testing.T) {
	deployment := complement.Deploy(t, 1)
	defer deployment.Destroy(t)
	alice := deployment.Register(t, "hs1", helpers.RegistrationOpts{})
	roomID := newRoom(t, alice)

	t.Run("durations that are none", func(t *testing.T) {
		for _, value := range []any{0, -1, 1.5, 1 << 40, "running", "soon", true, nil, []int{1}, object{}} {
			res := alice.Do(t, "PUT", statePath(roomID, "bad"), client.WithJSONBody(t, object{field: value}))
			mustFail(t, res, http.StatusBadRequest, "M_INVALID_PARAM")
		}
		mustFail(t, alice.GetStateEventContent(t, roomID, eventType, "bad"), http.StatusNotFound, "M_NOT_FOUND")
	})

	t.Run("requests that keep nothing alive", func(t *testing.T) {
		anybody := deployment.UnauthenticatedClient(t, "hs1")
		for _, test := range []struct {
			method, refreshMethod, body string
			code                        int
			errcode                     string
		}{
			{"PUT", "refresh", `{"expire_refresh_token":"unknown"}`, http.StatusNotFound, "M_NOT_FOUND"},
			{"PUT", "end", `{"expire_refresh_token":"unknown"}`, http.StatusNotFound, "M_NOT_FOUND"},
			{"PUT", "refresh", `{`, http.StatusBadRequest, "M_NOT_JSON"},
			{"PUT", "refresh", `{"expire_refresh_token":1}`, http.StatusBadRequest, "M_BAD_JSON"},
			{"PUT", "refresh", `{}`, http.StatusBadRequest, "M_MISSING_PARAM"},
			{"PUT", "resume", `{"expire_refresh_token":"unknown"}`, http.StatusNotFound, "M_UNRECOGNIZED"},
			{"POST", "refresh", `{"expire_refresh_token":"unknown"}`, http.StatusMethodNotAllowed, "M_UNRECOGNIZED"},
		} {
			path := []string{"_matrix", "client", "v3", "expiration", test.refreshMethod}
			mustFail(t, anybody.Do(t, test.method, path, client.WithRawBody([]byte(test.body))), test.code, test.errcode)
		}
	})

	t.Run("an event that is refused has no token", func(t *testing.T) {
		stranger := deployment.Register(t, "hs1", helpers.RegistrationOpts{})
		res := stranger.Do(t, "PUT", messagePath(roomID), client.WithJSONBody(t, object{field: short}))
		body := must.MatchResponse(t, res, match.HTTPResponse{StatusCode: http.StatusForbidden})
		must.MatchJSONBytes(t, body, match.JSONKeyMissing("expire_refresh_token"))
	})

	t.Run("an event whose sender has left cannot be ended", func(t *testing.T) {
		bob := deployment.Register(t, "hs1", helpers.RegistrationOpts{})
		bob.MustJoinRoom(t, roomID, nil)
		_, token := send(t, bob, messagePath(roomID), long)
		bob.MustLeaveRoom(t, roomID)
		mustFail(t, keepAlive(t, deployment, "end", token), http.StatusForbidden, "M_FORBIDDEN")
		mustBeGone(t, deployment, token)
	})
}

func TestExpiringEventSurvivesRestart(t *testing.T) {
	deployment := complement.Deploy(t, 1)
	defer deployment.Destroy(t)
	alice := deployment.Register(t, "hs1", helpers.RegistrationOpts{})
	roomID := newRoom(t, alice)

	eventID, token := send(t, alice, statePath(roomID, "short"), short)
	_, longToken := send(t, alice, statePath(roomID, "long"), long)
	running := awaitRunning(t, alice, roomID, eventID)
	must.NotError(t, "restarting", deployment.Restart(t))
	awaitClosing(t, alice, roomID, running, "expired")
	mustBeGone(t, deployment, token)
	mustRefresh(t, deployment, longToken)
	alice.SendEventSynced(t, roomID, b.Event{Type: "m.room.message", Content: object{"msgtype": "m.text", "body": "up again"}})
}

func TestExpiringEventOfServerThatStoodStill(t *testing.T) {
	deployment := complement.Deploy(t, 1)
	defer deployment.Destroy(t)
	alice := deployment.Register(t, "hs1", helpers.RegistrationOpts{})
	roomID := newRoom(t, alice)

	eventID, token := send(t, alice, messagePath(roomID), 1)
	deadline := time.Now().Add(time.Second)
	running := awaitRunning(t, alice, roomID, eventID)
	deployment.PauseServer(t, "hs1")
	time.Sleep(time.Until(deadline)) // a suspended server does nothing that the test could wait for
	deployment.UnpauseServer(t, "hs1")
	awaitClosing(t, alice, roomID, running, "expired")
	mustBeGone(t, deployment, token)
}
