package livekit

import (
	"crypto/sha256"
	"encoding/base64"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/stretchr/testify/require"
)

// left is a webhook as LiveKit sends it.
const left = `{"event":"participant_left","room":{"sid":"RM_1","name":"a room","emptyTimeout":300},"participant":{"sid":"PA_1",` +
	`"identity":"somebody","state":"DISCONNECTED","joinedAt":"946684700","disconnectReason":"SERVER_SHUTDOWN"},"id":"EV_1","createdAt":"946684799"}`

// webhookToken returns the claims with which LiveKit signs a body.
func webhookToken(body string) jwt.MapClaims {
	sum := sha256.Sum256([]byte(body))
	now := time.Now().Unix()
	return jwt.MapClaims{"iss": testKey, "nbf": now, "exp": now + 300, "sha256": base64.StdEncoding.EncodeToString(sum[:])}
}

func signed(t *testing.T, method jwt.SigningMethod, claims jwt.Claims, key any) string {
	t.Helper()
	token, err := jwt.NewWithClaims(method, claims).SignedString(key)
	require.NoError(t, err)
	return token
}

// A webhook of LiveKit's becomes an event. What LiveKit leaves out is empty.
func TestHear(t *testing.T) {
	for body, want := range map[string]Event{
		left: {
			Kind: ParticipantLeft, Participant: testParticipant, SID: "PA_1", RoomSID: "RM_1", Reason: ServerShutdown,
			Created: time.Unix(946684799, 0),
		},
		`{"event":"room_finished","room":{"sid":"RM_1","name":"a room"},"createdAt":"946684799"}`: {
			Kind: RoomFinished, Participant: Participant{Room: "a room"}, RoomSID: "RM_1", Created: time.Unix(946684799, 0),
		},
		`{"event":"of the future"}`: {Kind: "of the future", Created: time.Unix(0, 0)},
	} {
		event, err := newClient().Hear(signed(t, jwt.SigningMethodHS256, webhookToken(body), []byte(testSecret)), []byte(body))
		require.NoError(t, err)
		require.Equal(t, want, event)
	}
}

// Nothing is believed that LiveKit did not sign with our key: not another body, algorithm, key or time, and no token of ours.
func TestForgeries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		with := func(change func(jwt.MapClaims)) string {
			claims := webhookToken(left)
			change(claims)
			return signed(t, jwt.SigningMethodHS256, claims, []byte(testSecret))
		}
		c := newClient()
		participant, err := c.Token(Grant{Participant: testParticipant, Publish: true})
		require.NoError(t, err)
		admin, err := c.sign("", adminValidity, adminGrant{RoomCreate: true})
		require.NoError(t, err)
		good, now := with(func(jwt.MapClaims) {}), time.Now().Unix()
		for name, token := range map[string]string{
			"none":                   "",
			"no token":               "a.b",
			"signed by nobody":       signed(t, jwt.SigningMethodNone, webhookToken(left), jwt.UnsafeAllowNoneSignatureType),
			"another algorithm":      signed(t, jwt.SigningMethodHS512, webhookToken(left), []byte(testSecret)),
			"another secret":         signed(t, jwt.SigningMethodHS256, webhookToken(left), []byte("fedcba9876543210fedcba9876543210")),
			"no secret":              signed(t, jwt.SigningMethodHS256, webhookToken(left), []byte{}),
			"another key":            with(func(c jwt.MapClaims) { c["iss"] = "other" }),
			"no key":                 with(func(c jwt.MapClaims) { delete(c, "iss") }),
			"old":                    with(func(c jwt.MapClaims) { c["exp"] = now - 60 }),
			"without end":            with(func(c jwt.MapClaims) { delete(c, "exp") }),
			"of the future":          with(func(c jwt.MapClaims) { c["nbf"] = now + 61 }),
			"without begin":          with(func(c jwt.MapClaims) { delete(c, "nbf") }),
			"no hash":                with(func(c jwt.MapClaims) { delete(c, "sha256") }),
			"another body's hash":    with(func(c jwt.MapClaims) { c["sha256"] = webhookToken(left + " ")["sha256"] }),
			"a participant's token":  participant,
			"a token for the API":    admin,
			"with Bearer":            "Bearer " + good,
			"much too long":          with(func(c jwt.MapClaims) { c["more"] = strings.Repeat("A", maxAuthorization) }),
			"a secret as a number":   with(func(c jwt.MapClaims) { c["exp"] = "hush" }),
			"without its signature":  good[:strings.LastIndexByte(good, '.')+1],
			"with another signature": good[:len(good)-4] + "AAAA",
		} {
			_, err := c.Hear(token, []byte(left))
			require.Error(t, err, name)
			require.NotContains(t, err.Error(), "hush", name)
		}
		for name, body := range map[string]string{
			"another": strings.Replace(left, "somebody", "somebodx", 1), "longer": left + " ", "none": "",
			"encoded anew": strings.Replace(left, ",", ", ", 1),
		} {
			_, err := c.Hear(good, []byte(body))
			require.Error(t, err, name)
		}
		for _, skew := range []int64{-59, 0, 60} { // a clock may be a minute off
			_, err := c.Hear(with(func(c jwt.MapClaims) { c["nbf"], c["exp"] = now+skew, now+skew }), []byte(left))
			require.NoError(t, err, skew)
		}
		_, err = c.Hear(signed(t, jwt.SigningMethodHS256, webhookToken("[]"), []byte(testSecret)), []byte("[]"))
		require.Error(t, err, "JSON, but no event")
	})
}
