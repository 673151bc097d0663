package integration

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// What comes of a delayed event when it is due.

func testDelayedOrder(t *testing.T, alice, bob *user, roomID string) {
	follower := alice.follow(t, roomID)
	const n = 20
	var want []string
	for i := range n {
		[]*user{alice, bob}[i%2].delayMessage(t, roomID, 1500*time.Millisecond, fmt.Sprint("order", i))
		want = append(want, fmt.Sprint("order", i))
	}
	first := alice.delayState(t, roomID, "order", 1500*time.Millisecond, JSON{"body": "first"})
	second := alice.delayState(t, roomID, "order", 1500*time.Millisecond, JSON{"body": "second"})
	follower.await(t, "the last", withBody("second"))
	var got []string
	for _, e := range alice.timeline(t, roomID) {
		if body := e.Get("content.body").Str; strings.HasPrefix(body, "order") || body == "first" || body == "second" {
			got = append(got, body)
		}
	}
	require.Equal(t, append(want, "first", "second"), got)
	require.NotEqual(t, alice.finalised(t, first).Get("event_id").Str, alice.finalised(t, second).Get("event_id").Str)
	require.Equal(t, "second", alice.state(t, roomID, "order").Get("content.body").Str)
}

func testRefusedWhenSent(t *testing.T, alice, bob *user, roomID string) {
	name := "/_matrix/client/v3/rooms/" + url.PathEscape(roomID) + "/state/m.room.name/"
	empower := func(power int) {
		alice.levels(t, roomID, func(levels map[string]any) { levels["users"].(map[string]any)[bob.UserID] = power })
	}
	// schedule schedules an event for which its sender has the power only until the answer.
	schedule := func(delay string) string {
		empower(50)
		id := delayID(t, bob.must(t, http.MethodPut, name+delayParameter+delay, JSON{"name": "bob's"}))
		empower(0)
		return id
	}
	id := schedule("3600000")
	for _, path := range []string{unstableDelayed, stableDelayed} {
		res := bob.actDelayed(t, path, id, "send")
		require.Equal(t, http.StatusForbidden, res.Code, res)
		require.Equal(t, "M_FORBIDDEN", res.Get("errcode").Str)
	}
	require.Equal(t, []string{id}, bob.scheduled(t), "it stays")
	bob.acted(t, unstableDelayed, id, "cancel")

	id = schedule("2000")
	e := bob.finalised(t, id)
	require.Equal(t, "M_FORBIDDEN", e.Get("error.errcode").Str, e)
	require.False(t, e.Get("event_id").Exists())
	require.Equal(t, http.StatusNotFound, bob.actDelayed(t, unstableDelayed, id, "send").Code)
	require.Equal(t, http.StatusConflict, bob.actDelayed(t, stableDelayed, id, "send").Code)
	require.Equal(t, http.StatusNotFound, alice.do(t, http.MethodGet, name, nil).Code)

	// The opposite case: the sender gets the power back.
	id = schedule("3600000")
	empower(50)
	bob.acted(t, unstableDelayed, id, "send")
	require.Equal(t, "bob's", alice.must(t, http.MethodGet, name, nil).Get("name").Str)
}

// testStateOfOthers: state that anybody sets leaves the delayed events for it, and they replace it when they are sent.
func testStateOfOthers(t *testing.T, alice, bob *user, roomID string) {
	set := func(u *user, body string) {
		u.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "shared"), JSON{"body": body})
	}
	set(bob, "before")
	id := alice.delayState(t, roomID, "shared", time.Hour, JSON{"body": "delayed"})
	for _, u := range []*user{alice, bob} {
		set(u, "after")
		alice.acted(t, unstableDelayed, id, "restart")
		require.Equal(t, []string{id}, alice.scheduled(t))
	}
	require.Equal(t, "after", alice.state(t, roomID, "shared").Get("content.body").Str)
	alice.acted(t, unstableDelayed, id, "send")
	require.Equal(t, "delayed", bob.state(t, roomID, "shared").Get("content.body").Str)
}

func testDelayedExpires(t *testing.T, alice, _ *user, roomID string) {
	id := alice.delayState(t, roomID, "expires", time.Second, JSON{"m.will_expire": 2, "body": "x"})
	require.EqualValues(t, 2, alice.delayed(t, id).Get(`content.m\.will_expire`).Int(), "as it was written")
	e := alice.finalised(t, id)
	running := alice.event(t, roomID, e.Get("event_id").Str)
	require.Equal(t, "running", running.Get(`content.m\.will_expire`).Str)
	closing := alice.follow(t, roomID).awaitClosing(t, e.Get("event_id").Str, "expired")
	require.GreaterOrEqual(t, closing.Get("origin_server_ts").Int(), running.Get("origin_server_ts").Int()+2000, "early")
	require.EqualValues(t, 2, alice.delayed(t, id).Get(`content.m\.will_expire`).Int())

	// The room already has expiring state with this key. The new event still gets its full life, counted from its send.
	life := patience.Life(3)
	first := alice.sendState(t, roomID, "again", life, nil)
	id = alice.delayState(t, roomID, "again", time.Duration(life-2)*time.Second, JSON{"m.will_expire": 4})
	again := alice.event(t, roomID, alice.finalised(t, id).Get("event_id").Str)
	require.NotEqual(t, first.eventID, again.Get("event_id").Str)
	closing = alice.follow(t, roomID).awaitClosing(t, again.Get("event_id").Str, "expired")
	require.GreaterOrEqual(t, closing.Get("origin_server_ts").Int(), again.Get("origin_server_ts").Int()+4000, "early")
	require.Empty(t, alice.closings(t, roomID, first.eventID))
}

// testDelayedSameState: if the room already has the same state, Dendrite answers with the existing event.
func testDelayedSameState(t *testing.T, alice, _ *user, roomID string) {
	res := alice.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "same"), JSON{"body": "same"})
	id := alice.delayState(t, roomID, "same", time.Millisecond, JSON{"body": "same"})
	require.Equal(t, res.Get("event_id").Str, alice.finalised(t, id).Get("event_id").Str)
}

func testDelayedOfGuest(t *testing.T, alice, _ *user, _ string) {
	roomID, err := alice.CreateRoom(t.Context(), JSON{"initial_state": []JSON{
		{"type": "m.room.guest_access", "state_key": "", "content": JSON{"guest_access": "can_join"}},
	}})
	require.NoError(t, err)
	client, err := alice.s.RegisterGuest(t.Context())
	require.NoError(t, err)
	guest := &user{client, alice.s}
	require.NoError(t, guest.Join(t.Context(), roomID))
	id := guest.delayState(t, roomID, "guest", time.Hour, JSON{"body": "guest"})
	require.Equal(t, []string{id}, guest.scheduled(t))
	guest.acted(t, stableDelayed, id, "send")
	require.Equal(t, "guest", alice.state(t, roomID, "guest").Get("content.body").Str)
}

// testDelayedMembership: a user who has left cannot send the event, but can after coming back.
func testDelayedMembership(t *testing.T, _, bob *user, roomID string) {
	message := bob.delayMessage(t, roomID, time.Hour, "message")
	short := bob.delayMessage(t, roomID, time.Duration(patience.Life(2))*time.Second, "short")
	bob.must(t, http.MethodPost, "/_matrix/client/v3/rooms/"+url.PathEscape(roomID)+"/leave", JSON{})
	require.Equal(t, http.StatusForbidden, bob.actDelayed(t, unstableDelayed, message, "send").Code)
	require.Equal(t, "M_FORBIDDEN", bob.finalised(t, short).Get("error.errcode").Str)
	require.NoError(t, bob.Join(t.Context(), roomID))
	bob.acted(t, unstableDelayed, message, "send")
}

// testDelayedKick: a delayed kick and a delayed leave do what direct ones do, and no more.
func testDelayedKick(t *testing.T, alice, bob *user, roomID string) {
	carol, dave := alice.s.newUser(t), alice.s.newUser(t)
	for _, u := range []*user{carol, dave} {
		require.NoError(t, u.Join(t.Context(), roomID))
	}
	leave := func(u, whose *user, delay time.Duration) homeserver.Response {
		return u.do(t, http.MethodPut, homeserver.StatePath(roomID, "m.room.member", whose.UserID)+delayParameter+ms(delay),
			JSON{"membership": "leave", "reason": "time is up"})
	}
	kick := delayID(t, leave(alice, bob, time.Second))
	out := alice.event(t, roomID, alice.finalised(t, kick).Get("event_id").Str)
	require.Equal(t, "time is up", out.Get("content.reason").Str)
	require.Equal(t, alice.UserID, out.Get("sender").Str)
	require.Equal(t, http.StatusForbidden, bob.do(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), JSON{}).Code)
	require.NotContains(t, bob.must(t, http.MethodGet, "/_matrix/client/v3/joined_rooms", nil).Get("joined_rooms").Raw, roomID)

	own := delayID(t, leave(carol, carol, time.Second))
	require.NotEmpty(t, carol.finalised(t, own).Get("event_id").Str)
	require.Equal(t, http.StatusForbidden, carol.do(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), JSON{}).Code)

	forbidden := delayID(t, leave(dave, alice, time.Second))
	require.Equal(t, "M_FORBIDDEN", dave.finalised(t, forbidden).Get("error.errcode").Str, "dave has not the power")
	alice.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.message"), JSON{})
}
