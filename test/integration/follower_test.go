package integration

import (
	"fmt"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"
)

// follower reads a user's /sync.
type follower struct {
	u      *user
	roomID string
	since  string
	seen   []gjson.Result
	// patience limits the wait for an event.
	patience time.Duration
}

// follow starts to read the events of a room.
func (u *user) follow(t *testing.T, roomID string) *follower {
	t.Helper()
	f := &follower{u: u, roomID: roomID, patience: soon}
	f.read(t, 0)
	return f
}

// read makes one sync request, which waits for new events up to the given time.
func (f *follower) read(t *testing.T, timeout time.Duration) []gjson.Result {
	t.Helper()
	res := f.u.must(t, http.MethodGet, fmt.Sprintf("/_matrix/client/v3/sync?since=%s&timeout=%d",
		url.QueryEscape(f.since), timeout.Milliseconds()), nil)
	f.since = res.Get("next_batch").Str
	room := res.Get("rooms.join." + gjsonKey(f.roomID))
	events := append(room.Get("state.events").Array(), room.Get("timeline.events").Array()...)
	f.seen = append(f.seen, events...)
	return events
}

// await returns the first matching event, new or already seen.
func (f *follower) await(t *testing.T, what string, matches func(gjson.Result) bool) gjson.Result {
	t.Helper()
	deadline := time.Now().Add(f.patience)
	for events := f.seen; ; events = f.read(t, time.Second) {
		for _, e := range events {
			if matches(e) {
				return e
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s did not come", what)
		}
	}
}

// awaitEvent waits for an event and returns it.
func (f *follower) awaitEvent(t *testing.T, eventID string) gjson.Result {
	t.Helper()
	return f.await(t, eventID, func(e gjson.Result) bool { return e.Get("event_id").Str == eventID })
}

// awaitClosing waits for the closing event of an event and returns it.
func (f *follower) awaitClosing(t *testing.T, eventID, outcome string) gjson.Result {
	t.Helper()
	e := f.await(t, "the closing event of "+eventID, func(e gjson.Result) bool {
		return e.Get(`content.m\.relates_to.event_id`).Str == eventID && e.Get(`content.m\.relates_to.rel_type`).Str == "m.expire.relationship"
	})
	require.Equal(t, outcome, e.Get(`content.m\.will_expire`).Str)
	return e
}
