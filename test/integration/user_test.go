package integration

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// What a client does and sees, with assertions.

// user is a client with assertions.
type user struct {
	*homeserver.Client
	s *server
}

// newUser makes an account with a new name.
func (s *server) newUser(t *testing.T) *user {
	t.Helper()
	s.mu.Lock()
	s.users++
	name := fmt.Sprintf("user%d", s.users)
	s.mu.Unlock()
	c, err := s.Register(t.Context(), name)
	require.NoError(t, err)
	return &user{c, s}
}

// room makes a room with the given users, all joined. The first one creates it.
func (s *server) room(t *testing.T, users ...*user) string {
	t.Helper()
	roomID, err := users[0].CreateRoom(t.Context(), nil)
	require.NoError(t, err)
	for _, u := range users[1:] {
		require.NoError(t, u.Join(t.Context(), roomID))
	}
	return roomID
}

func (u *user) do(t *testing.T, method, path string, body any, header ...string) homeserver.Response {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), afterQueue)
	defer cancel()
	res, err := u.Do(ctx, method, path, body, header...)
	require.NoError(t, err)
	if isSend(method, path) {
		u.s.remember(res)
	} else {
		u.s.searchForTokens(t, "the answer to "+method+" "+path, res.Body)
	}
	return res
}

// must is do for a request that must succeed.
func (u *user) must(t *testing.T, method, path string, body any) homeserver.Response {
	t.Helper()
	res := u.do(t, method, path, body)
	require.Equal(t, http.StatusOK, res.Code, "%s %s: %s", method, path, res)
	return res
}

// sent is the answer to the send of an expiring event.
type sent struct {
	eventID, token string
}

// sendState sends an expiring state event, which must be accepted.
func (u *user) sendState(t *testing.T, roomID, stateKey string, seconds int, content JSON) sent {
	t.Helper()
	body := JSON{"m.will_expire": seconds}
	for key, value := range content {
		body[key] = value
	}
	return sentBy(t, u.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, stateKey), body))
}

// sendMessage sends an expiring message, which must be accepted.
func (u *user) sendMessage(t *testing.T, roomID string, seconds int) sent {
	t.Helper()
	return sentBy(t, u.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"),
		JSON{"m.will_expire": seconds, "msgtype": "m.text", "body": "hello"}))
}

func sentBy(t *testing.T, res homeserver.Response) sent {
	t.Helper()
	result := sent{res.Get("event_id").Str, res.Get("expire_refresh_token").Str}
	require.NotEmpty(t, result.eventID, res)
	require.NotEmpty(t, result.token, res)
	return result
}

// state returns the current state event, if there is one.
func (u *user) state(t *testing.T, roomID, stateKey string) gjson.Result {
	t.Helper()
	res := u.do(t, http.MethodGet, homeserver.StatePath(roomID, memberType, stateKey)+"?format=event", nil)
	if res.Code == http.StatusNotFound {
		return gjson.Result{}
	}
	require.Equal(t, http.StatusOK, res.Code, res)
	return res.Get("@this")
}

// timeline returns all events of a room that were sent before the call, the oldest first.
func (u *user) timeline(t *testing.T, roomID string) []gjson.Result {
	t.Helper()
	// Dendrite answers from a copy that follows the roomserver in order, so a mark shows when the copy is up to date. After a crash Dendrite
	// waits until pending messages are delivered again. After very many events the copy is minutes behind.
	const markType = "org.example.mark"
	mark := u.must(t, http.MethodPut, homeserver.SendPath(roomID, markType), JSON{}).Get("event_id").Str
	for done, seen := false, ""; !done; {
		eventuallyWithin(t, afterCrash, "the mark, or anything new", func() bool {
			newest, end := u.messages(t, roomID, "")
			done = slices.ContainsFunc(newest, func(e gjson.Result) bool { return e.Get("event_id").Str == mark })
			news := end != seen
			seen = end
			return done || news
		})
	}
	var events []gjson.Result
	for from := ""; ; {
		page, end := u.messages(t, roomID, from)
		events = append(events, page...)
		if len(page) == 0 || end == "" || end == from {
			break
		}
		from = end
	}
	slices.Reverse(events)
	return slices.DeleteFunc(events, func(e gjson.Result) bool { return e.Get("type").Str == markType })
}

// messages returns a page of a room's events, the newest first, and the token of the next page.
func (u *user) messages(t *testing.T, roomID, from string) (page []gjson.Result, end string) {
	t.Helper()
	path := "/_matrix/client/v3/rooms/" + url.PathEscape(roomID) + "/messages?dir=b&limit=100"
	if from != "" {
		path += "&from=" + url.QueryEscape(from)
	}
	res := u.must(t, http.MethodGet, path, nil)
	return res.Get("chunk").Array(), res.Get("end").Str
}

// event returns one event of a room. It waits until the event is visible.
func (u *user) event(t *testing.T, roomID, eventID string) gjson.Result {
	t.Helper()
	return u.follow(t, roomID).awaitEvent(t, eventID)
}

// closings returns the closing events of an event.
func (u *user) closings(t *testing.T, roomID, eventID string) (found []gjson.Result) {
	t.Helper()
	for _, e := range u.timeline(t, roomID) {
		if e.Get(`content.m\.relates_to.event_id`).Str == eventID && e.Get(`content.m\.will_expire`).Exists() {
			found = append(found, e)
		}
	}
	return found
}
