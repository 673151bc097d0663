//go:build all

package integration

import (
	"cmp"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

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
	t.Parallel()
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
