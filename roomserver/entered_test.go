package roomserver

import (
	"context"
	"errors"
	"testing"

	"github.com/matrix-org/dendrite/roomserver/types"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// An event that the roomserver has is in its room if new events are built upon it. Otherwise it was soft-failed.
func TestEntered(t *testing.T) {
	failed := errors.New("disk full")
	absent := func(g *graph, _ string) []string { return []string{g.add(t, 6, g.add(t, 5, "$b"))} }
	for name, test := range map[string]struct {
		membership string
		needed     int  // the power level that the event needs; Alice has 0
		due        bool // nobody waits for the answer
		failed     error
		latest     func(g *graph, eventID string) []string
		reason     expiration.DropReason // "" if it entered, or may yet
		again      bool
	}{
		"latest":                  {membership: "join", latest: func(_ *graph, e string) []string { return []string{e} }},
		"beside another":          {membership: "leave", latest: func(g *graph, e string) []string { return []string{g.add(t, 9, "$b"), e} }},
		"built upon":              {membership: "leave", latest: func(g *graph, e string) []string { return []string{g.add(t, 7, g.add(t, 6, e))} }},
		"soft-failed":             {membership: "join", latest: absent, again: true},
		"soft-failed, then left":  {membership: "leave", latest: absent, reason: expiration.SenderGone},
		"cannot be told":          {membership: "join", failed: failed},
		"below made-up depth":     {membership: "join", latest: func(g *graph, e string) []string { return []string{g.add(t, 1, e)} }},
		"due, set back":           {membership: "join", due: true, latest: absent},
		"due, demoted":            {membership: "join", needed: 50, due: true, latest: absent, again: true},
		"due, left":               {membership: "leave", due: true, latest: absent, reason: expiration.SenderGone},
		"due, demoted afterwards": {membership: "join", needed: 50, due: true, latest: func(_ *graph, e string) []string { return []string{e} }},
		"a busy room": {membership: "leave", latest: func(g *graph, _ string) (latest []string) {
			for range maxAncestors + 1 {
				latest = append(latest, g.add(t, 6, "$b"))
			}
			return latest
		}},
	} {
		t.Run(name, func(t *testing.T) {
			g := &graph{failed: test.failed}
			g.set(t, test.membership, test.needed)
			eventID := g.add(t, 5, "$a")
			if test.latest != nil {
				g.latest = test.latest(g, eventID)
			}
			err := g.outbox().entered(t.Context(), delayedTimer("m").Event, expiration.SignedEvent{
				EventID: eventID, RoomVersion: "10", PDU: g.events[eventID].JSON(),
			}, !test.due)
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

// If the owner loses the power between the building of an event and its input, the roomserver soft-fails the event without an error. Neither
// the first attempt nor its repetitions take the event for sent. The look costs one query.
func TestASoftFailIsNotTakenForSent(t *testing.T) {
	for _, o := range []expiration.Outcome{expiration.Expired, expiration.Ended} {
		for _, demoted := range []bool{false, true} {
			g := &graph{}
			g.set(t, "join", 0)
			g.latest = []string{g.add(t, 5, "$a")}
			g.input = func(e *types.HeaderedEvent) {
				g.queries = nil
				if demoted {
					g.set(t, "join", 50)
					return
				}
				g.latest = []string{e.EventID()}
			}
			timer := delayedTimer("m.room.message")
			timer.Event.StateKey, timer.Delayed.Content = nil, []byte(`{}`)
			var signed expiration.SignedEvent
			_, err := g.outbox().Send(t.Context(), timer, o, func(_ context.Context, b expiration.Built) error {
				signed = b.Signed()
				return nil
			})
			asked := g.queries
			again := g.outbox().Resubmit(t.Context(), timer, signed)
			if demoted {
				require.ErrorAs(t, err, new(*expiration.UnsendableError))
				require.ErrorAs(t, again, new(*expiration.UnsendableError))
			} else {
				require.NoError(t, err)
				require.NoError(t, again)
				require.Equal(t, []string{"latest"}, asked)
				require.Equal(t, []string{"latest"}, g.queries)
			}
		}
	}
}
