//go:build all

package integration

import (
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// From room version 11 on, a redaction names its target in the content. Dendrite's own redactions name it in both places. Those of other
// homeservers do not, and Dendrite ignores them. A client can send such a redaction.
func TestFederationRedactionInContent(t *testing.T) {
	t.Parallel()
	for i, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			p := startPair(t, startWithFailpoints, db, databases[(i+1)%len(databases)])
			roomID := p.newRoomOf(t, "11", p.alice, p.carol)
			weak, weakHere := p.far.newUser(t), p.near.newUser(t)
			for _, u := range []*user{weak, weakHere} {
				require.NoError(t, u.Join(t.Context(), roomID))
			}
			p.alice.arrived(t, roomID, p.carol)
			t.Run("ByAModerator", func(t *testing.T) {
				events := []sent{p.alice.sendState(t, roomID, "redacted", briefly, nil), p.alice.sendMessage(t, roomID, briefly)}
				for _, sent := range events {
					p.carol.event(t, roomID, sent.eventID)
					p.carol.redactInContent(t, roomID, sent)
				}
				p.stoppedIn(t, roomID, events...)
			})
			t.Run("BySomebodyOfTheServer", func(t *testing.T) {
				sent := p.alice.sendState(t, roomID, "redacted here", briefly, nil)
				weakHere.redactInContent(t, roomID, sent)
				p.stoppedIn(t, roomID, sent)
			})
			t.Run("BySomebodyWhoMayNot", func(t *testing.T) {
				sent := p.alice.sendState(t, roomID, "not redacted", briefly, nil)
				p.carol.event(t, roomID, sent.eventID)
				weak.redactInContent(t, roomID, sent)
				p.carol.follow(t, roomID).awaitClosing(t, sent.eventID, "expired")
			})
			t.Run("WhenItIsDue", func(t *testing.T) { testRedactedWhenDue(t, p, roomID) })
		})
	}
}

// The redaction is in the room, but the engine has not yet received it from the stream when the event is due.
func testRedactedWhenDue(t *testing.T, p *pair, roomID string) {
	const held = time.Second
	life := patience.Life(8)
	sent := p.alice.sendState(t, roomID, "due", life, JSON{"secret": 1})
	due := time.Now().Add(time.Duration(life) * time.Second)
	require.NoError(t, p.near.Failpoints(string(failpoint.Stream)+" hold"))
	p.carol.event(t, roomID, sent.eventID)
	p.carol.redactInContent(t, roomID, sent)
	p.carol.arrived(t, roomID, p.alice) // Dendrite does not show its clients a redaction that it does not apply
	require.True(t, time.Now().Before(due), "the machine is too busy: the redaction comes after the deadline")
	<-time.After(time.Until(due.Add(held)))
	require.NoError(t, p.near.Failpoints())
	p.stoppedIn(t, roomID, sent)
}

// redactInContent redacts an event as other homeservers do from room version 11 on.
func (u *user) redactInContent(t *testing.T, roomID string, sent sent) {
	t.Helper()
	u.must(t, http.MethodPut, homeserver.SendPath(roomID, "m.room.redaction"), JSON{"redacts": sent.eventID})
}
