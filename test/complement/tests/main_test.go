// Package tests checks expiring events with Complement: what clients and other homeservers see. The repository's own integration tests are
// much more thorough, but these tests run against any homeserver that Complement can deploy.
package tests

import (
	"net/http"
	"testing"
	"time"

	"github.com/matrix-org/complement"
	"github.com/matrix-org/complement/client"
	"github.com/matrix-org/complement/ct"
	"github.com/matrix-org/complement/helpers"
	"github.com/matrix-org/complement/match"
	"github.com/matrix-org/complement/must"
	"github.com/tidwall/gjson"
)

func TestMain(m *testing.M) { complement.TestMain(m, "expiring_events") }

const (
	eventType = "com.example.call"
	field     = "m.will_expire"
)

type object = map[string]any

// short is the shortest duration, in seconds, with which an event is still running when a test first looks at it. An event with a long one
// does not expire during a test.
const (
	short = 2
	long  = 3600
)

// newRoom makes a room in which every member may send the events of the tests.
func newRoom(t *testing.T, c *client.CSAPI) string {
	t.Helper()
	return c.MustCreateRoom(t, object{
		"preset":                       "public_chat",
		"power_level_content_override": object{"events": object{eventType: 0}},
	})
}

func messagePath(roomID string) []string {
	return []string{"_matrix", "client", "v3", "rooms", roomID, "send", eventType, helpers.GetTxnID("expiring")}
}

func statePath(roomID, stateKey string) []string {
	return []string{"_matrix", "client", "v3", "rooms", roomID, "state", eventType, stateKey}
}

// send sends an expiring event and returns its ID and its token.
func send(t *testing.T, c *client.CSAPI, path []string, seconds int) (eventID, token string) {
	t.Helper()
	res := c.MustDo(t, "PUT", path, client.WithJSONBody(t, object{"topic": "tea", field: seconds}))
	body := must.ParseJSON(t, res.Body)
	eventID, token = must.GetJSONFieldStr(t, body, "event_id"), must.GetJSONFieldStr(t, body, "expire_refresh_token")
	must.Equal(t, must.GetJSONFieldStr(t, body, "eventId"), eventID, "the event's ID as the draft spells it")
	return eventID, token
}

// keepAlive calls the keep-alive endpoint of a server, which needs no access token.
func keepAlive(t *testing.T, deployment complement.Deployment, method, token string) *http.Response {
	t.Helper()
	return deployment.UnauthenticatedClient(t, "hs1").Do(t, "PUT",
		[]string{"_matrix", "client", "v3", "expiration", method},
		client.WithJSONBody(t, object{"expire_refresh_token": token}))
}

func mustRefresh(t *testing.T, deployment complement.Deployment, token string) {
	t.Helper()
	must.MatchResponse(t, keepAlive(t, deployment, "refresh", token), match.HTTPResponse{StatusCode: http.StatusOK})
}

func mustEnd(t *testing.T, deployment complement.Deployment, token string) {
	t.Helper()
	must.MatchResponse(t, keepAlive(t, deployment, "end", token), match.HTTPResponse{StatusCode: http.StatusOK})
}

// mustBeGone checks that a server no longer accepts a token.
func mustBeGone(t *testing.T, deployment complement.Deployment, token string) {
	t.Helper()
	for _, method := range []string{"refresh", "end"} {
		mustFail(t, keepAlive(t, deployment, method, token), http.StatusNotFound, "M_NOT_FOUND")
	}
}

func mustFail(t *testing.T, res *http.Response, code int, errcode string) {
	t.Helper()
	must.MatchResponse(t, res, match.HTTPResponse{
		StatusCode: code, JSON: []match.JSON{match.JSONKeyEqual("errcode", errcode)},
	})
}

// awaitRunning waits until a user sees an expiring event, and returns it.
func awaitRunning(t *testing.T, c *client.CSAPI, roomID, eventID string) gjson.Result {
	t.Helper()
	event := await(t, c, roomID, func(event gjson.Result) bool { return event.Get("event_id").Str == eventID })
	must.MatchGJSON(t, event, match.JSONKeyEqual("content", object{"topic": "tea", field: "running"}))
	return event
}

// awaitClosing waits until a user sees the closing event of an expiring event, and returns it.
func awaitClosing(t *testing.T, c *client.CSAPI, roomID string, running gjson.Result, outcome string) gjson.Result {
	t.Helper()
	original := running.Get("event_id").Str
	event := await(t, c, roomID, func(event gjson.Result) bool {
		return event.Get(`content.m\.relates_to.event_id`).Str == original
	})
	for _, key := range []string{"type", "sender", "state_key"} {
		must.Equal(t, event.Get(key).Raw, running.Get(key).Raw, key+" of the closing event")
	}
	must.MatchGJSON(t, event, match.JSONKeyEqual("content", object{
		"topic": "tea", field: outcome,
		"m.relates_to": object{"event_id": original, "rel_type": "m.expire.relationship"},
	}))
	return event
}

// await waits until a user sees an event in a room.
func await(t *testing.T, c *client.CSAPI, roomID string, wanted func(gjson.Result) bool) (found gjson.Result) {
	t.Helper()
	c.MustSyncUntil(t, client.SyncReq{}, client.SyncTimelineHas(roomID, func(event gjson.Result) bool {
		if wanted(event) {
			found = event
		}
		return found.Exists()
	}))
	return found
}

// mustNotBeBefore checks the time of an event.
func mustNotBeBefore(t *testing.T, event gjson.Result, earliest time.Time) {
	t.Helper()
	if at := time.UnixMilli(event.Get("origin_server_ts").Int()); at.Before(earliest.Truncate(time.Millisecond)) {
		ct.Errorf(t, "%s is before %s: %s", at, earliest, event.Raw)
	}
}
