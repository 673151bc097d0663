package roomserver

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// graph is a roomserver with the events of one room, by their IDs, and its forward extremities.
type graph struct {
	membership
	events map[string]*types.HeaderedEvent
	latest []string
	failed error
}

func (g *graph) QueryLatestEventsAndState(
	_ context.Context, _ *api.QueryLatestEventsAndStateRequest, res *api.QueryLatestEventsAndStateResponse,
) error {
	res.LatestEvents = g.latest
	return g.failed
}

func (g *graph) QueryEventsByID(_ context.Context, req *api.QueryEventsByIDRequest, res *api.QueryEventsByIDResponse) error {
	for _, eventID := range req.EventIDs {
		if e := g.events[eventID]; e != nil {
			res.Events = append(res.Events, e)
		}
	}
	return nil
}

// add adds an event with the given prev event, and returns its ID.
func (g *graph) add(t *testing.T, depth int, prev string) string {
	t.Helper()
	version, err := gomatrixserverlib.GetRoomVersion(gomatrixserverlib.RoomVersionV10)
	require.NoError(t, err)
	pdu, err := version.NewEventFromTrustedJSON([]byte(fmt.Sprintf(`{"auth_events":[],"content":{},"origin_server_ts":%d,"depth":%d,"hashes":{"sha256":"x"},`+
		`"prev_events":[%q],"room_id":"!room:example.org","sender":"@alice:example.org","signatures":{},`+
		`"type":"m.room.message"}`, len(g.events), depth, prev)), false)
	require.NoError(t, err)
	if g.events == nil {
		g.events = map[string]*types.HeaderedEvent{}
	}
	g.events[pdu.EventID()] = &types.HeaderedEvent{PDU: pdu}
	return pdu.EventID()
}

// An event that the roomserver has is in its room if new events are built upon it. Otherwise it was soft-failed.
func TestEntered(t *testing.T) {
	failed := errors.New("disk full")
	for name, test := range map[string]struct {
		joined bool
		failed error
		latest func(g *graph, eventID string) []string
		reason expiration.DropReason // "" if it entered, or may yet
		again  bool
	}{
		"latest":                 {joined: true, latest: func(_ *graph, e string) []string { return []string{e} }},
		"beside another":         {latest: func(g *graph, e string) []string { return []string{g.add(t, 9, "$b"), e} }},
		"built upon":             {latest: func(g *graph, e string) []string { return []string{g.add(t, 7, g.add(t, 6, e))} }},
		"soft-failed":            {joined: true, latest: func(g *graph, _ string) []string { return []string{g.add(t, 5, "$b")} }, again: true},
		"soft-failed, then left": {latest: func(g *graph, _ string) []string { return []string{g.add(t, 6, g.add(t, 5, "$b"))} }, reason: expiration.SenderGone},
		"cannot be told":         {joined: true, failed: failed},
		"below made-up depth":    {joined: true, latest: func(g *graph, e string) []string { return []string{g.add(t, 1, e)} }},
		"a busy room": {latest: func(g *graph, _ string) (latest []string) {
			for range maxAncestors + 1 {
				latest = append(latest, g.add(t, 6, "$b"))
			}
			return latest
		}},
	} {
		t.Run(name, func(t *testing.T) {
			g := &graph{membership: membership{exists: true, joined: test.joined}, failed: test.failed}
			eventID := g.add(t, 5, "$a")
			if test.latest != nil {
				g.latest = test.latest(g, eventID)
			}
			wrapper := NewAPI(g)
			err := NewCloser(nil, wrapper).entered(t.Context(), delayedTimer("m").Event, expiration.SignedEvent{
				EventID: eventID, PDU: g.events[eventID].JSON(),
			}, true)
			var dropped *expiration.DropError
			switch {
			case test.failed != nil:
				require.ErrorIs(t, err, test.failed)
			case test.again:
				require.ErrorAs(t, err, new(*expiration.UnsendableError))
			case test.reason == "":
				require.NoError(t, err)
			default:
				require.ErrorAs(t, err, &dropped)
				require.Equal(t, test.reason, dropped.Reason)
			}
		})
	}
}
