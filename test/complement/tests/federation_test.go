package tests

import (
	"testing"

	"github.com/matrix-org/complement"
	"github.com/matrix-org/complement/client"
	"github.com/matrix-org/complement/helpers"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/tidwall/gjson"
)

// TestExpiringEventsFederate requires only plain federation of the second server.
func TestExpiringEventsFederate(t *testing.T) {
	deployment := complement.Deploy(t, 2)
	defer deployment.Destroy(t)
	alice := deployment.Register(t, "hs1", helpers.RegistrationOpts{})
	bob := deployment.Register(t, "hs2", helpers.RegistrationOpts{})
	roomID := newRoom(t, alice)
	bob.MustJoinRoom(t, roomID, []spec.ServerName{deployment.GetFullyQualifiedHomeserverName(t, "hs1")})

	t.Run("another server sees the event run and expire", func(t *testing.T) {
		eventID, _ := send(t, alice, messagePath(roomID), short)
		awaitClosing(t, bob, roomID, awaitRunning(t, bob, roomID, eventID), "expired")
	})

	t.Run("another server sees the event run and end", func(t *testing.T) {
		eventID, token := send(t, alice, statePath(roomID, "ended"), long)
		running := awaitRunning(t, bob, roomID, eventID)
		mustEnd(t, deployment, token)
		awaitClosing(t, bob, roomID, running, "ended")
	})

	t.Run("another server's user replaces the event", func(t *testing.T) {
		eventID, token := send(t, alice, statePath(roomID, "replaced"), long)
		awaitRunning(t, bob, roomID, eventID)
		bob.MustDo(t, "PUT", statePath(roomID, "replaced"), client.WithJSONBody(t, object{"topic": "coffee"}))
		await(t, alice, roomID, func(event gjson.Result) bool {
			return event.Get("sender").Str == bob.UserID && event.Get("state_key").Str == "replaced"
		})
		mustBeGone(t, deployment, token)
	})
}
