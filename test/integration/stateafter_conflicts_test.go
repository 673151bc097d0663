//go:build all

package integration

import (
	"fmt"
	"maps"
	"net/url"
	"sync"
	"testing"
	"time"
)

// Two servers change the same state while the connection between them is interrupted. A client that uses only state_after agrees with its
// own server about the winner, even if the losing event is the last one in its timeline.
func TestStateAfterConflicts(t *testing.T) {
	t.Parallel()
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
