//go:build all

package livekit_test

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/livekit/protocol/auth"
	sfu "github.com/livekit/protocol/livekit"
	"github.com/stretchr/testify/require"
	"github.com/twitchtv/twirp"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

// LiveKit's own client for its API finds a room as MSC4195 wants it.
func TestRooms(t *testing.T) {
	s := start(t)
	c := s.client()
	_, err := c.Room(t.Context(), room)
	require.ErrorIs(t, err, livekit.ErrNotFound)

	made, err := c.CreateRoom(t.Context(), room)
	require.NoError(t, err)
	again, err := c.CreateRoom(t.Context(), room)
	require.NoError(t, err)
	require.Equal(t, made, again)
	_, err = c.CreateRoom(t.Context(), livekit.RoomName("!other:example.com", "m.call#ROOM"))
	require.NoError(t, err)
	found, err := c.Room(t.Context(), room)
	require.NoError(t, err)
	require.Equal(t, made, found)

	token, err := auth.NewAccessToken(key, secret).SetVideoGrant(&auth.VideoGrant{RoomCreate: true, RoomList: true}).ToJWT()
	require.NoError(t, err)
	ctx, err := twirp.WithHTTPRequestHeaders(t.Context(), http.Header{"Authorization": {"Bearer " + token}})
	require.NoError(t, err)
	theirs := sfu.NewRoomServiceProtobufClient("http://"+s.address, http.DefaultClient)
	list, err := theirs.ListRooms(ctx, &sfu.ListRoomsRequest{Names: []string{room}})
	require.NoError(t, err)
	require.Len(t, list.Rooms, 1)
	require.Equal(t, made, livekit.Room{SID: list.Rooms[0].Sid, Name: list.Rooms[0].Name})
	require.EqualValues(t, 300, list.Rooms[0].EmptyTimeout)
	require.EqualValues(t, 20, list.Rooms[0].DepartureTimeout)
	require.Zero(t, list.Rooms[0].MaxParticipants)

	// A room that is made again under its name is another one.
	_, err = theirs.DeleteRoom(ctx, &sfu.DeleteRoomRequest{Room: room})
	require.NoError(t, err)
	_, err = c.Room(t.Context(), room)
	require.ErrorIs(t, err, livekit.ErrNotFound)
	anew, err := c.CreateRoom(t.Context(), room)
	require.NoError(t, err)
	require.NotEqual(t, made.SID, anew.SID)
}

// Participants are listed, found and removed. Who is not there is not found, in a room that is not there either.
func TestParticipants(t *testing.T) {
	s := start(t)
	c := s.client()
	notThere := func(p livekit.Participant) {
		t.Helper()
		_, err := c.Participant(t.Context(), p)
		require.ErrorIs(t, err, livekit.ErrNotFound)
		require.ErrorIs(t, c.Remove(t.Context(), p), livekit.ErrNotFound)
	}
	list, err := c.Participants(t.Context(), room)
	require.NoError(t, err)
	require.Empty(t, list)
	notThere(alice)
	_, err = c.CreateRoom(t.Context(), room)
	require.NoError(t, err)
	list, err = c.Participants(t.Context(), room)
	require.NoError(t, err)
	require.Empty(t, list)
	notThere(alice)

	connection, info := s.join(t, alice)
	_, bobs := s.join(t, bob)
	var session livekit.Session
	await(t, "Alice", func() bool {
		session, err = c.Participant(t.Context(), alice)
		return err == nil
	})
	require.Equal(t, livekit.Session{SID: info.Sid, Identity: alice.Identity, State: session.State}, session)
	require.Contains(t, []livekit.State{livekit.Joining, livekit.Joined, livekit.Active}, session.State)
	await(t, "both", func() bool {
		list, err = c.Participants(t.Context(), room)
		return err == nil && len(list) == 2
	})
	require.ElementsMatch(t, []string{info.Sid, bobs.Sid}, []string{list[0].SID, list[1].SID})
	require.True(t, slices.ContainsFunc(list, func(s livekit.Session) bool { return s.Identity == bob.Identity }))

	require.NoError(t, c.Remove(t.Context(), alice))
	select {
	case <-connection.closed:
	case <-time.After(soon):
		t.Fatal("Alice is still connected")
	}
	for event := (livekit.Event{}); event.SID != info.Sid; { // she could also have been thrown out for not sending an offer
		if event = hear(t, c, next(t, s.webhooks)); event.SID == info.Sid {
			require.EqualValues(t, "PARTICIPANT_REMOVED", event.Reason)
		}
	}
	await(t, "the end of Alice's session", func() bool {
		_, err := c.Participant(t.Context(), alice)
		return errors.Is(err, livekit.ErrNotFound)
	})
	notThere(alice)
	_, err = c.Participant(t.Context(), bob)
	require.NoError(t, err)

	// Until her token expires, she can come back. This is another session.
	_, again := s.join(t, alice)
	require.NotEqual(t, info.Sid, again.Sid)
}

// The names of the states are LiveKit's.
func TestStates(t *testing.T) {
	for _, state := range []livekit.State{livekit.Joining, livekit.Joined, livekit.Active, livekit.Disconnected} {
		require.Contains(t, sfu.ParticipantInfo_State_value, string(state))
	}
	require.Len(t, sfu.ParticipantInfo_State_value, 4)
}

// A wrong key is not a LiveKit that is away, and neither of them is a participant who is not there.
func TestFailures(t *testing.T) {
	s := start(t)
	page := httptest.NewServer(http.FileServer(http.Dir(t.TempDir())))
	defer page.Close()
	try := func(cfg livekit.Config) []error {
		c := livekit.New(cfg)
		_, check := c.Check(t.Context())
		_, create := c.CreateRoom(t.Context(), room)
		_, found := c.Room(t.Context(), room)
		_, list := c.Participants(t.Context(), room)
		_, session := c.Participant(t.Context(), alice)
		return []error{check, create, found, list, session, c.Remove(t.Context(), alice)}
	}
	url := "http://" + s.address
	for _, cfg := range []livekit.Config{{APIURL: url, Key: key, Secret: other}, {APIURL: url, Key: "another", Secret: secret}} {
		for _, err := range try(cfg) {
			require.ErrorIs(t, err, livekit.ErrRefused)
			require.NotContains(t, err.Error(), "eyJ", "a token begins so")
		}
	}
	isAway := func(url string) {
		t.Helper()
		for _, err := range try(livekit.Config{APIURL: url, Key: key, Secret: secret}) {
			require.Error(t, err)
			require.NotErrorIs(t, err, livekit.ErrRefused)
			require.NotErrorIs(t, err, livekit.ErrNotFound)
		}
	}
	isAway(page.URL)
	isAway(url + "/somewhere")
	skew, err := s.client().Check(t.Context())
	require.NoError(t, err)
	require.Zero(t, skew)
	require.NoError(t, s.process.Kill())
	await(t, "the end of LiveKit", func() bool {
		_, err := s.client().Check(t.Context())
		return err != nil
	})
	isAway(url)
}
