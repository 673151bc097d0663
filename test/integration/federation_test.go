//go:build all

package integration

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// These tests check what other servers see of expiring events, and what their users can do to them.

// longAway is longer than the time after which a server tries again to reach one that was down for a few seconds.
var longAway = patience.For(90 * time.Second)

// pair is two servers that federate, and a room with users of both.
type pair struct {
	near, far *server
	// gate holds the requests of the far server to the near one.
	gate *homeserver.Gate
	// alice and bob are users of the near server, and carol is a user of the far server. Alice has created the room, and bob and carol are
	// moderators.
	alice, bob, carol *user
	roomID            string
}

// onEachPair runs a test with two servers of its own. The near one runs on each of the databases.
func onEachPair(t *testing.T, test func(t *testing.T, p *pair)) {
	for i, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			test(t, startPair(t, start, db, databases[(i+1)%len(databases)]))
		})
	}
}

// startPair starts two servers, the near one with startNear.
func startPair(t *testing.T, startNear func(*testing.T, homeserver.Config) *server, near, far database) *pair {
	t.Helper()
	authority, err := homeserver.NewAuthority(t.TempDir())
	require.NoError(t, err)
	gate, err := homeserver.NewGate("127.0.0.2")
	require.NoError(t, err)
	t.Cleanup(func() { _ = gate.Close() })
	at := func(host string, db database, gate *homeserver.Gate) homeserver.Config {
		return homeserver.Config{
			Postgres: db.open(t), Expiration: unlimited,
			Federation: &homeserver.Federation{Host: host, Authority: authority, Gate: gate},
		}
	}
	p := &pair{near: startNear(t, at("127.0.0.2", near, gate)), far: start(t, at("127.0.0.3", far, nil)), gate: gate}
	p.alice, p.bob, p.carol = p.near.newUser(t), p.near.newUser(t), p.far.newUser(t)
	p.roomID = p.newRoom(t, p.alice, p.bob, p.carol)
	return p
}

// newRoom makes a room. The first user creates it, and the others are moderators.
func (p *pair) newRoom(t *testing.T, users ...*user) string {
	t.Helper()
	return p.newRoomOf(t, "10", users...)
}

// newRoomOf is newRoom with a room version.
func (p *pair) newRoomOf(t *testing.T, version string, users ...*user) string {
	t.Helper()
	levels := JSON{users[0].UserID: 100}
	for _, u := range users[1:] {
		levels[u.UserID] = 50
	}
	roomID, err := users[0].CreateRoom(t.Context(), JSON{
		"room_version":                 version,
		"power_level_content_override": JSON{"users": levels, "events": JSON{memberType: 0}},
	})
	require.NoError(t, err)
	for _, u := range users[1:] {
		require.NoError(t, u.Join(t.Context(), roomID))
	}
	return roomID
}

// arrived waits until another user sees all events that this user sees in the room.
func (u *user) arrived(t *testing.T, roomID string, at *user) {
	t.Helper()
	follower := at.follow(t, roomID)
	follower.awaitEvent(t, u.must(t, http.MethodPut, homeserver.SendPath(roomID, "org.example.arrived"), JSON{}).Get("event_id").Str)
}

func TestFederation(t *testing.T) {
	onEachPair(t, func(t *testing.T, p *pair) {
		t.Run("SeenByTheOther", func(t *testing.T) { testSeen(t, p) })
		t.Run("SentByTheOther", func(t *testing.T) { testSentByTheOther(t, p) })
		t.Run("ReplacedByTheOther", func(t *testing.T) { testReplacedByTheOther(t, p) })
		t.Run("DelayedAndReplacedByTheOther", func(t *testing.T) { testDelayedReplacedByTheOther(t, p) })
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

// A moderator of the far server sends the state that a user of the near server has delayed. The far server also sees delayed events when
// they are sent.
func testDelayedReplacedByTheOther(t *testing.T, p *pair) {
	far := p.carol.follow(t, p.roomID)
	id := p.alice.delayState(t, p.roomID, "delayed", time.Second, JSON{"body": "alice's"})
	sent := far.await(t, "the delayed event", withBody("alice's"))
	require.Equal(t, p.alice.finalised(t, id).Get("event_id").Str, sent.Get("event_id").Str)
	require.NotContains(t, sent.Raw, "delay_id")

	id = p.alice.delayState(t, p.roomID, "delayed", time.Hour, JSON{"body": "too late"})
	newer := p.carol.must(t, http.MethodPut, homeserver.StatePath(p.roomID, memberType, "delayed"), JSON{"body": "carol's"}).Get("event_id").Str
	cancelled := p.alice.finalised(t, id)
	require.False(t, cancelled.Get("event_id").Exists() || cancelled.Get("error").Exists(), cancelled)
	require.Equal(t, newer, p.alice.state(t, p.roomID, "delayed").Get("event_id").Str)
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

// suspend suspends a server's process. The server still accepts connections, but answers nothing.
func suspend(t *testing.T, s *server) {
	t.Helper()
	pid := s.Pid()
	require.NoError(t, syscall.Kill(pid, syscall.SIGSTOP))
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGCONT) }) // otherwise the process could not be stopped
}

func resume(t *testing.T, s *server) {
	t.Helper()
	require.NoError(t, syscall.Kill(s.Pid(), syscall.SIGCONT))
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

// rival is a user who replaces expiring state at the moment of its expiry.
type rival struct {
	name string
	*user
	// local means that the rival is a user of the server that closes the event.
	local bool
}

// race is one expiring event and the rival's event that replaces it.
type race struct {
	rival rival
	key   string
	sent  sent
	newer string // the ID of the rival's event
}

// Many events expire and are replaced at the same moment: by the same user on another device, by a local moderator, and by a user of the
// far server. The guarantees depend on the rival:
//
//   - A local rival's event always wins. A closing event, if there is one, comes before it.
//   - A remote rival's event can cross the closing event on the way. Both servers then agree on the later one by origin_server_ts, or by
//     event ID if the times are equal. The closing event bears the deadline as its time, so the rival's event wins if it was sent after
//     the deadline. If the rival's event reaches the near server first, there is no closing event.
//
// No event ever has two closing events. No closing event is ever built on an event that it overwrites.
func TestFederationRaces(t *testing.T) {
	onEachPair(t, func(t *testing.T, p *pair) {
		const waves, perWave, life = 3, 36, 3 * time.Second
		rivals := p.rivals(t)
		won := map[string]int{}
		for range waves {
			roomID := p.newRoom(t, p.alice, p.bob, p.carol)
			var wg sync.WaitGroup
			races := make([]race, perWave)
			for i := range races {
				r, step := &races[i], i/len(rivals)
				*r = race{rival: rivals[i%len(rivals)], key: fmt.Sprint("race", i)}
				wg.Go(func() {
					owner := []*user{p.alice, p.bob}[step%2]
					r.sent = owner.sendState(t, roomID, r.key, int(life.Seconds()), JSON{"race": i})
					// The sends are spread from a little before the deadline until a little after it. A remote event takes a while to arrive, and the
					// closing events are built one after the other.
					delay := time.Duration(step-9) * 25 * time.Millisecond
					if r.rival.local {
						delay = time.Duration(step) * 100 * time.Millisecond
					}
					<-time.After(life + delay)
					r.newer = r.rival.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, r.key), JSON{"newer": i}).Get("event_id").Str
				})
			}
			wg.Wait()
			if t.Failed() {
				t.FailNow()
			}
			p.judge(t, roomID, races, won)
		}
		for _, how := range slices.Sorted(maps.Keys(won)) {
			t.Logf("%4d  %s", won[how], how)
		}
	})
}

// rivals returns one rival of each kind. The owners of the events are alice and bob, who are both moderators.
func (p *pair) rivals(t *testing.T) []rival {
	t.Helper()
	res := (&user{p.near.Anonymous(), p.near}).must(t, http.MethodPost, "/_matrix/client/v3/login", JSON{
		"type": "m.login.password", "password": homeserver.Password,
		"identifier": JSON{"type": "m.id.user", "user": p.alice.UserID},
	})
	device := *p.alice.Client
	device.Token = res.Get("access_token").Str
	return []rival{
		{"another device", &user{&device, p.near}, true}, {"a local moderator", p.bob, true}, {"a remote user", p.carol, false},
	}
}

// judge checks the outcome of the races in a room after both servers have all events, and counts the outcomes by kind.
func (p *pair) judge(t *testing.T, roomID string, races []race, won map[string]int) {
	t.Helper()
	control := p.alice.sendMessage(t, roomID, 1)
	p.alice.follow(t, roomID).awaitClosing(t, control.eventID, "expired")
	p.alice.arrived(t, roomID, p.carol)
	p.carol.arrived(t, roomID, p.alice)

	timeline := p.alice.timeline(t, roomID)
	place, events := map[string]int{}, map[string]gjson.Result{}
	closing := map[string]gjson.Result{}
	for i, e := range timeline {
		place[e.Get("event_id").Str], events[e.Get("event_id").Str] = i, e
		if closes := e.Get(`content.m\.relates_to.event_id`).Str; closes != "" {
			require.NotContains(t, closing, closes, "closed twice")
			closing[closes] = e
		}
	}
	want := map[string]string{}
	for _, r := range races {
		require.Contains(t, place, r.newer)
		c, closed := closing[r.sent.eventID]
		closingID := c.Get("event_id").Str
		want[r.key] = r.newer
		switch {
		case !closed:
			won[r.rival.name+": before the closing event was built"]++
		case place[closingID] < place[r.newer] && r.rival.local:
			won[r.rival.name+": after the closing event"]++
		case r.rival.local:
			t.Errorf("%s: a closing event came over newer state", r.rival.name)
		case later(c, events[r.newer]):
			want[r.key] = closingID
			won[r.rival.name+": lost, was sent before the deadline, and came after it"]++
		case place[closingID] < place[r.newer]:
			won[r.rival.name+": after the closing event, or across it"]++
		default:
			won[r.rival.name+": across the closing event, and first"]++
		}
	}
	p.settle(t, roomID, want)
}

// later reports whether state resolution prefers a to b, if neither event is an ancestor of the other and both senders have the same
// power.
func later(a, b gjson.Result) bool {
	if c := cmp.Compare(a.Get("origin_server_ts").Int(), b.Get("origin_server_ts").Int()); c != 0 {
		return c > 0
	}
	return a.Get("event_id").Str > b.Get("event_id").Str
}

// The summary of a room that this server is not in comes from another server: one that the request names, or the one with the alias. Only
// users with an account get it.
func TestRemoteRoomSummary(t *testing.T) {
	onEachPair(t, func(t *testing.T, p *pair) {
		club := p.carol.roomWith(t, JSON{"join_rule": "public"})
		p.alice.joinBy(t, club, p.far)
		public, err := p.carol.CreateRoom(t.Context(), JSON{"preset": "public_chat", "name": "far", "room_alias_name": "far"})
		require.NoError(t, err)
		restricted := p.carol.roomWith(t, JSON{"join_rule": "restricted", "allow": allow(club)})
		secret := p.carol.roomWith(t, JSON{"join_rule": "invite"})

		far := p.far.Name
		res := p.alice.must(t, http.MethodGet, summaryPath(public, "127.0.0.9:1", "not a server", p.near.Name, far), nil)
		require.Equal(t, "far", res.Get("name").Str)
		require.Equal(t, "leave", res.Get("membership").Str)
		require.Equal(t, "public", res.Get("join_rule").Str)
		require.Equal(t, int64(1), res.Get("num_joined_members").Int())
		require.Equal(t, public, p.alice.must(t, http.MethodGet, summaryPath("#far:"+far), nil).Get("room_id").Str)

		res = p.alice.must(t, http.MethodGet, summaryPath(restricted, far), nil)
		require.Equal(t, club, res.Get("allowed_room_ids.0").Str)
		guest, err := p.near.RegisterGuest(t.Context())
		require.NoError(t, err)
		for _, test := range []struct {
			u    *user
			path string
		}{
			{p.bob, summaryPath(restricted, far)}, // not a member of the club
			{p.alice, summaryPath(secret, far)}, {p.alice, summaryPath(public)}, {p.alice, summaryPath("#none:" + far)},
			{&user{p.near.Anonymous(), p.near}, summaryPath(public, far)}, {&user{guest, p.near}, summaryPath(public, far)},
			{&user{p.near.Anonymous(), p.near}, summaryPath("#far:" + far)},
		} {
			require.Equal(t, http.StatusNotFound, test.u.do(t, http.MethodGet, test.path, nil).Code, test.path)
		}
	})
}

// joinBy joins a room by way of another server.
func (u *user) joinBy(t *testing.T, roomID string, via *server) {
	t.Helper()
	u.must(t, http.MethodPost, "/_matrix/client/v3/join/"+url.PathEscape(roomID)+"?server_name="+url.QueryEscape(via.Name), JSON{})
}

// Two servers change the same state while the connection between them is interrupted. A client that uses only state_after agrees with its
// own server about the winner, even if the losing event is the last one in its timeline.
func TestStateAfterConflicts(t *testing.T) {
	onEachPair(t, func(t *testing.T, p *pair) {
		const keys = 8
		p.alice.arrived(t, p.roomID, p.carol)
		p.carol.arrived(t, p.roomID, p.alice)
		near, far := p.alice.mirror(nil), p.carol.mirror(url.Values{"filter": {`{"room":{"timeline":{"limit":1}}}`}})
		near.sync(t, 0)
		far.sync(t, 0)
		wrong := 0
		for round := range 3 {
			var writers sync.WaitGroup
			for i := range keys {
				for _, u := range []*user{p.alice, p.carol} {
					writers.Go(func() { u.put(t, p.roomID, memberType, fmt.Sprint("conflict", i), JSON{"round": round}) })
				}
			}
			writers.Wait()
			if t.Failed() {
				t.FailNow()
			}
			p.alice.arrived(t, p.roomID, p.carol)
			p.carol.arrived(t, p.roomID, p.alice)
			for _, m := range []*mirror{near, far} {
				want := m.u.fullState(t, p.roomID)
				naive := map[string]string{}
				eventually(t, "the client knows the state", func() bool {
					room := m.sync(t, time.Second).Get(gjsonKey(p.roomID))
					for _, e := range room.Get("timeline.events").Array() {
						if e.Get("type").Str == memberType {
							naive[stateKeyOf(e)] = e.Get("event_id").Str
						}
					}
					return maps.Equal(want, m.known(p.roomID))
				})
				for key, eventID := range naive {
					if want[key] != eventID {
						wrong++
					}
				}
			}
		}
		t.Logf("%d times the timeline would have told a client the loser", wrong)
	})
}
