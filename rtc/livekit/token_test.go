package livekit

import (
	"encoding/json"
	"fmt"
	"testing"
	"testing/synctest"

	"github.com/golang-jwt/jwt/v5"
	"github.com/stretchr/testify/require"
)

const (
	testKey    = "matrix"
	testSecret = "0123456789abcdef0123456789abcdef"
)

var testConfig = Config{APIURL: "http://sfu.test/", Key: testKey, Secret: testSecret}

func newClient() *Client { return New(testConfig) }

// claimsOf returns the claims of a token that is signed with the test's secret, as JSON.
func claimsOf(t *testing.T, token string) string {
	t.Helper()
	parsed, err := jwt.Parse(token, func(*jwt.Token) (any, error) { return []byte(testSecret), nil }, jwt.WithValidMethods([]string{"HS256"}))
	require.NoError(t, err)
	text, err := json.Marshal(parsed.Claims)
	require.NoError(t, err)
	return string(text)
}

// A token has the claims of MSC4195, and no others. What a client may not do is said.
func TestToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // it is 2000-01-01 00:00:00 UTC, which is 946684800
		for _, publish := range []bool{true, false} {
			token, err := newClient().Token(Grant{Participant: Participant{Room: "a room", Identity: "somebody"}, Publish: publish})
			require.NoError(t, err)
			require.JSONEq(t, fmt.Sprintf(`{
				"iss": "matrix", "sub": "somebody", "nbf": 946684800, "exp": 946685400,
				"video": {"room": "a room", "roomJoin": true, "canSubscribe": true, "canPublish": %[1]v, "canPublishData": %[1]v, "canUpdateOwnMetadata": false}
			}`, publish), claimsOf(t, token))
		}
	})
}

// However a configuration or a client is printed, the secret is not.
func TestSecretIsHidden(t *testing.T) {
	c := newClient()
	holder := struct{ client *Client }{c}
	for _, value := range []any{c, *c, holder, &holder, testConfig, &testConfig, testConfig.Secret, []Secret{testSecret}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			printed := fmt.Sprintf(verb, value)
			require.NotContains(t, printed, testSecret, verb)
			require.NotContains(t, printed, fmt.Sprintf("%x", testSecret), verb)
		}
	}
	text, err := json.Marshal(testConfig)
	require.NoError(t, err)
	require.JSONEq(t, `{"APIURL": "http://sfu.test/", "Key": "matrix", "Secret": "…"}`, string(text))
}
