//go:build all

package integration

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// These tests check what other servers see of expiring events, and what their users can do to them.

func TestFederation(t *testing.T) {
	t.Parallel()
	onEachPair(t, func(t *testing.T, p *pair) {
		t.Run("SeenByTheOther", func(t *testing.T) { testSeen(t, p) })
		t.Run("SentByTheOther", func(t *testing.T) { testSentByTheOther(t, p) })
		t.Run("ReplacedByTheOther", func(t *testing.T) { testReplacedByTheOther(t, p) })
		t.Run("DelayedAndStateOfTheOther", func(t *testing.T) { testDelayedAndStateOfTheOther(t, p) })
		t.Run("StoppedByTheOther", func(t *testing.T) { testStoppedByTheOther(t, p) })
		t.Run("TheOtherHangs", func(t *testing.T) { testAway(t, p, suspend, resume) })
		t.Run("TheOtherIsDown", func(t *testing.T) {
			testAway(t, p, func(_ *testing.T, s *server) { s.Kill() }, func(t *testing.T, s *server) {
				require.NoError(t, s.Start(t.Context()))
			})
		})
	})
}

// The far server has the same events, running and closing. Nowhere does it have their life times.
func testSeen(t *testing.T, p *pair) {
	const kept = 86123 // a number that is not found by chance
	near, far := p.alice.follow(t, p.roomID), p.carol.follow(t, p.roomID)
	content := func(seconds int) JSON {
		return JSON{"m.will_expire": seconds, "html": "<&>", "n": 9007199254740991, "m.relates_to": JSON{"rel_type": "m.reference", "event_id": "$other"}}
	}
	outcomes := map[string]string{}
	for outcome, seconds := range map[string]int{"expired": 1, "ended": kept} {
		for _, path := range []string{
			homeserver.StatePath(p.roomID, memberType, outcome), homeserver.StatePath(p.roomID, "m.call."+outcome, p.alice.UserID),
			homeserver.SendPath(p.roomID, "m.room.message"), homeserver.SendPath(p.roomID, "m.room.encrypted"),
		} {
			sent := sentBy(t, p.alice.must(t, http.MethodPut, path, content(seconds)))
			outcomes[sent.eventID] = outcome
			for _, f := range []*follower{near, far} { // one by one, because a sync has only the newest events
				f.awaitEvent(t, sent.eventID)
			}
			if outcome == "ended" {
				code, errcode := p.near.keepAlive(t, "end", sent.token)
				require.Equal(t, http.StatusOK, code, errcode)
			}
		}
	}
	for eventID, outcome := range outcomes {
		closing := near.awaitClosing(t, eventID, outcome).Get("event_id").Str
		for id, want := range map[string]string{eventID: "running", closing: outcome} {
			here, there := near.awaitEvent(t, id), far.awaitEvent(t, id)
			require.Equal(t, want, there.Get(`content.m\.will_expire`).Str)
			path := "/_matrix/client/v3/rooms/" + url.PathEscape(p.roomID) + "/event/" + url.PathEscape(id)
			fetched := p.carol.must(t, http.MethodGet, path, nil).Get("@this")
			for _, field := range []string{"type", "sender", "state_key", "content", "origin_server_ts"} {
				require.Equal(t, here.Get(field).Value(), there.Get(field).Value(), field)
				require.Equal(t, here.Get(field).Value(), fetched.Get(field).Value(), field)
			}
			for _, seen := range []gjson.Result{there, fetched} {
				require.NotContains(t, seen.Get("content").Raw+seen.Get("unsigned").Raw, "86123")
			}
		}
	}
	for _, outcome := range []string{"expired", "ended"} {
		require.Equal(t, outcome, p.carol.state(t, p.roomID, outcome).Get(`content.m\.will_expire`).Str)
	}
}

// A user of the far server sends into the near server's room. The far server keeps the timer.
func testSentByTheOther(t *testing.T, p *pair) {
	follower := p.alice.follow(t, p.roomID)
	for _, outcome := range []string{"expired", "ended"} {
		seconds := 600
		if outcome == "expired" {
			seconds = 2
		}
		events := []sent{p.carol.sendState(t, p.roomID, outcome, seconds, JSON{"by": "carol"}), p.carol.sendMessage(t, p.roomID, seconds)}
		for _, sent := range events {
			p.near.refused(t, sent.token)
			require.Equal(t, "running", p.alice.event(t, p.roomID, sent.eventID).Get(`content.m\.will_expire`).Str)
			if outcome == "ended" {
				code, errcode := p.far.keepAlive(t, "end", sent.token)
				require.Equal(t, http.StatusOK, code, errcode)
			}
		}
		for _, sent := range events {
			closing := follower.awaitClosing(t, sent.eventID, outcome)
			require.Equal(t, p.carol.UserID, closing.Get("sender").Str)
			p.far.refused(t, sent.token)
		}
		require.Equal(t, outcome, p.alice.state(t, p.roomID, outcome).Get(`content.m\.will_expire`).Str)
	}
}

// A moderator of the far server sends newer state.
func testReplacedByTheOther(t *testing.T, p *pair) {
	old := p.alice.sendState(t, p.roomID, "replaced", briefly, nil)
	p.carol.event(t, p.roomID, old.eventID)
	newer := p.carol.must(t, http.MethodPut, homeserver.StatePath(p.roomID, memberType, "replaced"), JSON{"by": "carol"}).Get("event_id").Str
	p.stopped(t, old)
	for _, u := range []*user{p.alice, p.carol} {
		require.Equal(t, newer, u.state(t, p.roomID, "replaced").Get("event_id").Str)
	}
}

// A moderator of the far server sends the state that a user of the near server has delayed. That leaves the delayed event, and both servers
// have its state when it is sent.
func testDelayedAndStateOfTheOther(t *testing.T, p *pair) {
	far := p.carol.follow(t, p.roomID)
	id := p.alice.delayState(t, p.roomID, "delayed", time.Second, JSON{"body": "alice's"})
	sent := far.await(t, "the delayed event", withBody("alice's"))
	require.Equal(t, p.alice.finalised(t, id).Get("event_id").Str, sent.Get("event_id").Str)
	require.NotContains(t, sent.Raw, "delay_id")

	id = p.alice.delayState(t, p.roomID, "delayed", time.Hour, JSON{"body": "later"})
	p.carol.must(t, http.MethodPut, homeserver.StatePath(p.roomID, memberType, "delayed"), JSON{"body": "carol's"})
	p.alice.follow(t, p.roomID).await(t, "the other's state", withBody("carol's"))
	require.Equal(t, []string{id}, p.alice.scheduled(t))
	p.alice.acted(t, unstableDelayed, id, "send")
	far.await(t, "the delayed event", withBody("later"))
	for _, u := range []*user{p.alice, p.carol} {
		require.Equal(t, "later", u.state(t, p.roomID, "delayed").Get("content.body").Str)
	}
}

// stopped requires that the near server drops the timers of the given events, and that neither server gets a closing event.
func (p *pair) stopped(t *testing.T, events ...sent) {
	t.Helper()
	p.stoppedIn(t, p.roomID, events...)
}

// stoppedIn is stopped for another room.
func (p *pair) stoppedIn(t *testing.T, roomID string, events ...sent) {
	t.Helper()
	gone(t, p.near, p.alice, roomID, events...)
	p.alice.arrived(t, roomID, p.carol)
	for _, sent := range events {
		require.Empty(t, p.carol.closings(t, roomID, sent.eventID))
	}
}

// A moderator of the far server redacts, kicks and bans.
func testStoppedByTheOther(t *testing.T, p *pair) {
	room := "/_matrix/client/v3/rooms/" + url.PathEscape(p.roomID)
	events := []sent{p.alice.sendMessage(t, p.roomID, briefly), p.alice.sendState(t, p.roomID, "redacted", briefly, JSON{"secret": 1})}
	for _, sent := range events {
		p.carol.event(t, p.roomID, sent.eventID)
		p.carol.must(t, http.MethodPut, room+"/redact/"+url.PathEscape(sent.eventID)+"/"+sent.eventID[1:9], JSON{})
	}
	for _, how := range []string{"kick", "ban"} {
		dave := p.near.newUser(t)
		require.NoError(t, dave.Join(t.Context(), p.roomID))
		message, state := dave.sendMessage(t, p.roomID, briefly), dave.sendState(t, p.roomID, dave.UserID, briefly, nil)
		events = append(events, message, state)
		p.carol.event(t, p.roomID, state.eventID)
		p.carol.must(t, http.MethodPost, room+"/"+how, JSON{"user_id": dave.UserID})
	}
	p.stopped(t, events...)
}

// No send waits for a server that does not answer. When that server is back, it gets the events.
func testAway(t *testing.T, p *pair, goAway, comeBack func(*testing.T, *server)) {
	// atOnce is longer than a send takes here, and shorter than the five minutes for which a server waits for an answer of another.
	atOnce := patience.For(5 * time.Second)
	life := time.Duration(patience.Life(3)) * time.Second
	p.alice.arrived(t, p.roomID, p.carol)
	goAway(t, p.far)
	near := p.alice.follow(t, p.roomID)
	quick := func(what string, f func()) {
		t.Helper()
		before := time.Now()
		f()
		require.Less(t, time.Since(before), atOnce, what)
	}
	key := strings.ReplaceAll(t.Name(), "/", " ")
	var state, message, ended sent
	quick("sending", func() {
		state, message = p.alice.sendState(t, p.roomID, key, int(life.Seconds()), nil), p.alice.sendMessage(t, p.roomID, int(life.Seconds()))
		ended = p.alice.sendState(t, p.roomID, key+" ended", 600, nil)
	})
	for range 5 {
		quick("keep-alive", func() {
			p.near.refreshed(t, state.token)
			p.near.refreshed(t, message.token)
		})
	}
	expires := time.Now().Add(life)
	quick("ending", func() {
		code, errcode := p.near.keepAlive(t, "end", ended.token)
		require.Equal(t, http.StatusOK, code, errcode)
	})
	near.awaitClosing(t, ended.eventID, "ended")
	near.awaitClosing(t, state.eventID, "expired")
	near.awaitClosing(t, message.eventID, "expired")
	require.Less(t, time.Since(expires), atOnce, "expiring")

	comeBack(t, p.far)
	far, said := p.carol.follow(t, p.roomID), time.Time{}
	for sent, outcome := range map[sent]string{state: "expired", message: "expired", ended: "ended"} {
		eventuallyWithin(t, longAway, "the other has the closing event", func() bool {
			// A server knows that another one is up when the other one sends an event. In a room that was quiet for a minute, a received event may
			// stay in Dendrite's queue until the next one arrives.
			if time.Since(said) > time.Second {
				p.carol.must(t, http.MethodPut, homeserver.SendPath(p.roomID, "m.room.message"), JSON{"msgtype": "m.text", "body": "I am back"})
				said = time.Now()
			}
			far.read(t, time.Second)
			return slices.ContainsFunc(far.seen, func(e gjson.Result) bool { return e.Get(`content.m\.relates_to.event_id`).Str == sent.eventID })
		})
		far.awaitClosing(t, sent.eventID, outcome)
		require.Equal(t, "running", far.awaitEvent(t, sent.eventID).Get(`content.m\.will_expire`).Str)
	}
	require.Equal(t, "expired", p.carol.state(t, p.roomID, key).Get(`content.m\.will_expire`).Str)
	require.Equal(t, "ended", p.carol.state(t, p.roomID, key+" ended").Get(`content.m\.will_expire`).Str)
}

// State that is sent after the deadline wins, even if the closing event is built later without knowing that state. Here the near server
// was busy or down when the deadline passed.
func TestFederationLateClosing(t *testing.T) {
	t.Parallel()
	onEachPair(t, func(t *testing.T, p *pair) {
		t.Run("Suspended", func(t *testing.T) { testLateClosing(t, p, suspend, resume) })
		t.Run("Killed", func(t *testing.T) {
			testLateClosing(t, p, func(_ *testing.T, s *server) { s.Kill() }, func(t *testing.T, s *server) {
				require.NoError(t, s.Start(t.Context()))
			})
		})
	})
}

func testLateClosing(t *testing.T, p *pair, goAway, comeBack func(*testing.T, *server)) {
	const keys = 10
	life := time.Duration(patience.Life(4)) * time.Second
	prefix := strings.ReplaceAll(t.Name(), "/", " ")
	var events []sent
	for i := range keys {
		events = append(events, p.alice.sendState(t, p.roomID, fmt.Sprint(prefix, i), int(life.Seconds()), nil))
	}
	passed := time.After(life)
	p.alice.arrived(t, p.roomID, p.carol)
	goAway(t, p.near)
	<-passed
	want := map[string]string{}
	for i := range keys {
		key := fmt.Sprint(prefix, i)
		want[key] = p.carol.must(t, http.MethodPut, homeserver.StatePath(p.roomID, memberType, key), JSON{"by": "carol"}).Get("event_id").Str
	}
	comeBack(t, p.near)

	control := p.alice.sendMessage(t, p.roomID, 1)
	p.alice.follow(t, p.roomID).awaitClosing(t, control.eventID, "expired")
	p.settle(t, p.roomID, want)
	crossed := 0
	for _, sent := range events {
		closings := p.alice.closings(t, p.roomID, sent.eventID)
		require.LessOrEqual(t, len(closings), 1)
		crossed += len(closings)
	}
	t.Logf("%d of %d closing events crossed newer state", crossed, keys)
}

// settle waits until both servers have the given events as the current state, by state key. Then it waits until each has received all
// events of the other, after which the state must still be the same.
func (p *pair) settle(t *testing.T, roomID string, want map[string]string) {
	t.Helper()
	agrees := func(u *user) bool { return len(u.differing(t, roomID, want)) == 0 }
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("of %d pieces of state, the near server differs in %d and the far one in %d", len(want),
				len(p.alice.differing(t, roomID, want)), len(p.carol.differing(t, roomID, want)))
		}
	})
	eventuallyWithin(t, longAway, "both have the same state", func() bool { return agrees(p.alice) && agrees(p.carol) })
	p.alice.arrived(t, roomID, p.carol)
	p.carol.arrived(t, roomID, p.alice)
	require.True(t, agrees(p.alice) && agrees(p.carol), "the state changed once more")
}

// differing returns the state keys whose current event is not the given one.
func (u *user) differing(t *testing.T, roomID string, want map[string]string) (keys []string) {
	t.Helper()
	res, err := u.Do(context.Background(), http.MethodGet, "/_matrix/client/v3/rooms/"+url.PathEscape(roomID)+"/state", nil)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, res.Code, res)
	current := map[string]string{}
	for _, e := range res.Get("@this").Array() {
		if e.Get("type").Str == memberType {
			current[e.Get("state_key").Str] = e.Get("event_id").Str
		}
	}
	for key, eventID := range want {
		if current[key] != eventID {
			keys = append(keys, key)
		}
	}
	return keys
}
