//go:build all

package livekit_test

import (
	"net/http"
	"testing"

	"github.com/livekit/protocol/auth"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

// LiveKit's own library accepts a token, and makes the same claims of the same grant.
func TestClaims(t *testing.T) {
	participant := livekit.Participant{Room: livekit.RoomName("!a<b>&:example.com", "m.call#ROOM"), Identity: "@alice:example.com:DEVICE"}
	c := livekit.New(livekit.Config{Key: key, Secret: secret})
	for _, publish := range []bool{true, false} {
		ours, err := c.Token(livekit.Grant{Participant: participant, Publish: publish})
		require.NoError(t, err)
		grant := &auth.VideoGrant{Room: participant.Room, RoomJoin: true}
		grant.SetCanSubscribe(true)
		grant.SetCanPublish(publish)
		grant.SetCanPublishData(publish)
		grant.SetCanUpdateOwnMetadata(false)
		theirs, err := auth.NewAccessToken(key, secret).SetIdentity(participant.Identity).SetValidFor(livekit.TokenValidity).
			SetVideoGrant(grant).ToJWT()
		require.NoError(t, err)

		ourToken, err := auth.ParseAPIToken(ours)
		require.NoError(t, err)
		require.Equal(t, key, ourToken.APIKey())
		ourClaims, ourGrants, err := ourToken.Verify(secret)
		require.NoError(t, err)
		theirToken, err := auth.ParseAPIToken(theirs)
		require.NoError(t, err)
		theirClaims, theirGrants, err := theirToken.Verify(secret)
		require.NoError(t, err)

		require.Equal(t, theirGrants, ourGrants)
		require.Equal(t, livekit.TokenValidity, ourClaims.ExpiresAt.Sub(ourClaims.NotBefore.Time))
		theirClaims.IssuedAt = nil                                                              // not in MSC4195
		theirClaims.NotBefore, theirClaims.ExpiresAt = ourClaims.NotBefore, ourClaims.ExpiresAt // a second may have passed
		require.Equal(t, theirClaims, ourClaims)

		_, _, err = ourToken.Verify(other)
		require.Error(t, err)
	}
}

// The real LiveKit lets a participant do what the token says. It does so only if the room is there and the token is signed with its secret.
func TestConnecting(t *testing.T) {
	s := start(t)
	c := s.client()
	token := func(c *livekit.Client, publish bool) string {
		token, err := c.Token(livekit.Grant{Participant: alice, Publish: publish})
		require.NoError(t, err)
		return token
	}
	refused := func(status int, token string) {
		t.Helper()
		_, res, err := s.dial(token)
		require.Error(t, err)
		require.NotNil(t, res, "%v", err)
		require.Equal(t, status, res.StatusCode)
	}
	refused(http.StatusNotFound, token(c, true))
	_, err := c.CreateRoom(t.Context(), alice.Room)
	require.NoError(t, err)
	refused(http.StatusUnauthorized, token(livekit.New(livekit.Config{Key: key, Secret: other}), true))
	refused(http.StatusUnauthorized, token(livekit.New(livekit.Config{Key: "another", Secret: secret}), true))
	for _, publish := range []bool{true, false} {
		conn, info := s.connect(t, token(c, publish))
		require.Equal(t, alice.Identity, info.Identity)
		require.Equal(t, publish, info.Permission.CanPublish)
		require.Equal(t, publish, info.Permission.CanPublishData)
		require.True(t, info.Permission.CanSubscribe)
		require.False(t, info.Permission.CanUpdateMetadata)
		require.False(t, info.Permission.Hidden)
		require.NoError(t, conn.Close())
	}
}
