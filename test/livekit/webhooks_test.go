//go:build all

package livekit_test

import (
	"bytes"
	"net/http"
	"testing"
	"time"

	"github.com/livekit/protocol/auth"
	sfu "github.com/livekit/protocol/livekit"
	"github.com/livekit/protocol/webhook"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

// next returns the next webhook.
func next(t *testing.T, webhooks chan received) received {
	t.Helper()
	select {
	case w := <-webhooks:
		return w
	case <-time.After(soon):
		t.Fatal("no webhook comes")
		return received{}
	}
}

// hear returns the event of a webhook that must be LiveKit's. It must be the one that LiveKit's own library reads.
func hear(t *testing.T, c *livekit.Client, w received) livekit.Event {
	t.Helper()
	event, err := c.Hear(w.authorization, w.body)
	require.NoError(t, err)
	req, err := http.NewRequest(http.MethodPost, "http://127.0.0.1/", bytes.NewReader(w.body))
	require.NoError(t, err)
	req.Header.Set("Authorization", w.authorization)
	theirs, err := webhook.ReceiveWebhookEvent(req, auth.NewSimpleKeyProvider(key, secret))
	require.NoError(t, err)
	want := livekit.Event{
		Kind:        livekit.Kind(theirs.Event),
		Participant: livekit.Participant{Room: theirs.GetRoom().GetName(), Identity: theirs.GetParticipant().GetIdentity()},
		SID:         theirs.GetParticipant().GetSid(), RoomSID: theirs.GetRoom().GetSid(), Created: time.Unix(theirs.CreatedAt, 0),
	}
	if reason := theirs.GetParticipant().GetDisconnectReason(); reason != 0 {
		want.Reason = livekit.Reason(reason.String())
	}
	require.Equal(t, want, event)
	return event
}

// What the real LiveKit reports about a participant without media is heard. With another secret, or another body, nothing is.
func TestWebhooks(t *testing.T) {
	s := start(t)
	c := s.client()
	made, err := c.CreateRoom(t.Context(), room)
	require.NoError(t, err)
	connection, info := s.join(t, alice)
	started := next(t, s.webhooks)
	event := hear(t, c, started)
	require.Equal(t, livekit.Kind("room_started"), event.Kind)
	require.Equal(t, livekit.Participant{Room: room}, event.Participant)
	require.Equal(t, made.SID, event.RoomSID)
	require.WithinDuration(t, time.Now(), event.Created, soon)
	require.NoError(t, connection.Close())
	aborted := next(t, s.webhooks)
	event = hear(t, c, aborted)
	require.Equal(t, livekit.Event{
		Kind: livekit.ParticipantAborted, Participant: alice, SID: info.Sid, RoomSID: made.SID, Reason: livekit.SignalClose, Created: event.Created,
	}, event)

	token, err := c.Token(livekit.Grant{Participant: alice, Publish: true})
	require.NoError(t, err)
	for name, forged := range map[string]received{
		"another webhook's token": {started.authorization, aborted.body},
		"a participant's token":   {token, aborted.body},
		"another body":            {aborted.authorization, bytes.ReplaceAll(aborted.body, []byte(alice.Identity), []byte(bob.Identity))},
		"no token":                {"", aborted.body},
	} {
		_, err := c.Hear(forged.authorization, forged.body)
		require.Error(t, err, name)
	}
	for _, cfg := range []livekit.Config{{Key: key, Secret: other}, {Key: "another", Secret: secret}} {
		_, err := livekit.New(cfg).Hear(aborted.authorization, aborted.body)
		require.Error(t, err)
	}
}

// Every kind of event that LiveKit's library sends is heard, with every reason.
func TestEvents(t *testing.T) {
	url, webhooks := receive(t)
	notifier := webhook.NewURLNotifier(webhook.URLNotifierParams{URL: url, APIKey: key, APISecret: secret})
	defer notifier.Stop(true)
	c := livekit.New(livekit.Config{Key: key, Secret: secret})
	hears := func(kind string, reason sfu.DisconnectReason) livekit.Event {
		require.NoError(t, notifier.QueueNotify(t.Context(), &sfu.WebhookEvent{
			Event: kind, Room: &sfu.Room{Name: room, Sid: "RM_1", NumParticipants: 2}, CreatedAt: 946684800, Id: "EV_1",
			Participant: &sfu.ParticipantInfo{
				Sid: "PA_1", Identity: alice.Identity, State: sfu.ParticipantInfo_ACTIVE, JoinedAt: 946684700, DisconnectReason: reason,
				Tracks: []*sfu.TrackInfo{{Sid: "TR_1", Name: "<b>&\u2028", Type: sfu.TrackType_VIDEO}},
			},
		}))
		event := hear(t, c, next(t, webhooks))
		require.Equal(t, livekit.Event{
			Kind: livekit.Kind(kind), Participant: alice, SID: "PA_1", RoomSID: "RM_1", Reason: event.Reason, Created: time.Unix(946684800, 0),
		}, event)
		return event
	}
	for theirs, ours := range map[string]livekit.Kind{
		webhook.EventParticipantJoined: livekit.ParticipantJoined, webhook.EventParticipantLeft: livekit.ParticipantLeft,
		webhook.EventParticipantConnectionAborted: livekit.ParticipantAborted, webhook.EventRoomFinished: livekit.RoomFinished,
	} {
		require.Equal(t, ours, hears(theirs, 0).Kind)
	}
	for theirs, ours := range map[sfu.DisconnectReason]livekit.Reason{
		sfu.DisconnectReason_SERVER_SHUTDOWN: livekit.ServerShutdown, sfu.DisconnectReason_STATE_MISMATCH: livekit.StateMismatch,
		sfu.DisconnectReason_MIGRATION: livekit.Migration, sfu.DisconnectReason_SIGNAL_CLOSE: livekit.SignalClose,
	} {
		require.Equal(t, ours, hears(webhook.EventParticipantLeft, theirs).Reason)
	}
	for _, reason := range sfu.DisconnectReason_value {
		hears(webhook.EventParticipantLeft, sfu.DisconnectReason(reason))
	}
}

// A LiveKit with another key, or with another secret for our key, is not heard.
func TestForeignLiveKit(t *testing.T) {
	c := livekit.New(livekit.Config{Key: key, Secret: secret})
	for _, params := range []webhook.URLNotifierParams{{APIKey: "another", APISecret: secret}, {APIKey: key, APISecret: other}} {
		url, webhooks := receive(t)
		params.URL = url
		notifier := webhook.NewURLNotifier(params)
		require.NoError(t, notifier.QueueNotify(t.Context(), &sfu.WebhookEvent{Event: webhook.EventRoomFinished, Room: &sfu.Room{Name: room}}))
		w := next(t, webhooks)
		notifier.Stop(true)
		_, err := c.Hear(w.authorization, w.body)
		require.Error(t, err)
	}
}
