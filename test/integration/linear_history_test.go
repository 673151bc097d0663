//go:build all

package integration

import (
	"cmp"
	"slices"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/tidwall/gjson"
)

// The history of one state key, from the requests and the timeline.

// history is the history of one state key, as the checker needs it.
type history struct {
	events     []stateEvent
	indexes    map[string]int // by event ID
	operations []porcupine.Operation
}

// stateEvent has the certain facts about an event.
type stateEvent struct {
	id            string
	content, user int
	expires       bool
}

// none is the index of no event.
const none = -1

func (h *history) index(eventID string) int {
	if eventID == "" {
		return none
	}
	i, ok := h.indexes[eventID]
	if !ok {
		i = len(h.events)
		h.events, h.indexes[eventID] = append(h.events, stateEvent{id: eventID}), i
	}
	return i
}

// add adds one step, which is atomic for all observers.
func (h *history) add(client int, call, ret int64, s step) {
	h.operations = append(h.operations, porcupine.Operation{ClientId: client, Call: call, Return: ret, Input: s})
}

// history combines the requests with the server's own actions. The events that the server closed because they expired are in the room's
// timeline.
func (k *contested) history(t *testing.T, timeline []gjson.Result) *history {
	h := &history{indexes: map[string]int{}}
	type closing struct {
		index, closes int
		outcome       string
		built         int64
	}
	var closings []closing
	for _, e := range timeline {
		original := e.Get(`content.m\.relates_to.event_id`).Str
		if e.Get("type").Str == memberType && e.Get("state_key").Str == k.key && original != "" {
			closings = append(closings, closing{
				h.index(e.Get("event_id").Str), h.index(original), e.Get(`content.m\.will_expire`).Str,
				time.UnixMilli(e.Get("origin_server_ts").Int()).UnixNano(),
			})
		}
	}
	// A request with two steps needs two rows in the visualization.
	row := func(r request) int { return 2 * r.client }
	last, seen := int64(0), map[int]int64{}
	slices.SortFunc(k.requests, func(a, b request) int { return cmp.Compare(a.ret, b.ret) })
	for _, r := range k.requests {
		last = max(last, r.ret)
		i := h.index(r.event)
		switch r.verb {
		case send:
			h.events[i] = stateEvent{id: r.event, content: r.content, user: r.user, expires: r.seconds > 0}
			put := step{verb: send, event: i, at: r.call, duration: int64(r.seconds) * int64(time.Second)}
			h.add(row(r), r.call, r.ret, put)
			h.add(row(r)+1, r.call, r.ret, step{verb: answered, event: i})
		case read:
			if _, ok := seen[i]; !ok {
				seen[i] = r.ret
			}
			h.add(row(r), r.call, r.ret, step{verb: read, event: i})
		case refresh:
			h.add(row(r), r.call, r.ret, step{verb: refresh, event: i, at: r.call, refused: !r.accepted})
		case end:
			if !r.accepted {
				h.add(row(r), r.call, r.ret, step{verb: end, event: i, refused: true})
				break
			}
			at := slices.IndexFunc(closings, func(c closing) bool { return c.closes == i && c.outcome == "ended" })
			if at < 0 {
				t.Errorf("/end was accepted for %s, which has no other closing event with \"ended\"", r.event)
				break
			}
			h.add(row(r), r.call, r.ret, step{verb: claim, event: i, at: never})
			h.add(row(r)+1, r.call, r.ret, step{verb: show, event: closings[at].index, closes: i})
			closings = slices.Delete(closings, at, at+1)
		}
	}
	for _, c := range closings {
		if c.outcome != "expired" {
			t.Errorf("nobody ended %s", h.events[c.closes].id)
		}
		ret, ok := seen[c.index]
		if !ok {
			ret = last
		}
		// The event's time is the time when it was built, or its deadline. The claim happened after that.
		h.add(2*linearClients, c.built-tick, ret, step{verb: claim, event: c.closes, at: c.built})
		h.add(2*linearClients+1, c.built-tick, ret, step{verb: show, event: c.index, closes: c.closes})
	}
	return h
}
