package integration

import (
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	transportsPath = "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports"
	wellKnownPath  = "/.well-known/matrix/client"
)

// Clients learn the transports of calls (MSC4143) from an endpoint, if they are logged in, and from the well-known file.
func TestTransports(t *testing.T) {
	t.Parallel()
	const both = `[{"type":"livekit","livekit_service_url":"https://a.example/jwt"},{"type":"livekit","livekit_service_url":"http://b.example:8080"}]`
	s := start(t, homeserver.Config{WellKnown: true, MatrixRTC: JSON{"transports": []JSON{
		{"type": "livekit", "livekit_service_url": "https://a.example/jwt"},
		{"type": "livekit", "livekit_service_url": "http://b.example:8080"},
	}}})
	guest, err := s.RegisterGuest(t.Context())
	require.NoError(t, err)
	for _, u := range []*user{s.newUser(t), {guest, s}} {
		require.JSONEq(t, `{"rtc_transports":`+both+`}`, string(u.must(t, http.MethodGet, transportsPath, nil).Body))
		require.True(t, u.must(t, http.MethodGet, "/_matrix/client/versions", nil).Get(`unstable_features.org\.matrix\.msc4143`).Bool())
	}
	anybody := &user{s.Anonymous(), s}
	require.Equal(t, http.StatusUnauthorized, anybody.do(t, http.MethodGet, transportsPath, nil).Code)
	res := anybody.must(t, http.MethodGet, wellKnownPath, nil)
	require.JSONEq(t, both, res.Get(`org\.matrix\.msc4143\.rtc_foci`).Raw)
	require.Equal(t, s.URL, res.Get(`m\.homeserver.base_url`).Str, "what Dendrite says")
	require.Equal(t, "*", res.Header.Get("Access-Control-Allow-Origin"))
}

// Without configured transports the endpoint returns an empty list. The well-known file has no such field, and /versions no such feature.
func TestNoTransports(t *testing.T) {
	t.Parallel()
	s := start(t, homeserver.Config{WellKnown: true})
	alice := s.newUser(t)
	require.JSONEq(t, `{"rtc_transports":[]}`, string(alice.must(t, http.MethodGet, transportsPath, nil).Body))
	require.False(t, alice.must(t, http.MethodGet, wellKnownPath, nil).Get(`org\.matrix\.msc4143\.rtc_foci`).Exists())
	require.False(t, alice.must(t, http.MethodGet, "/_matrix/client/versions", nil).Get(`unstable_features.org\.matrix\.msc4143`).Exists())
}

// A server that does not publish its URL does not publish transports in the well-known file either.
func TestTransportsWithoutWellKnown(t *testing.T) {
	t.Parallel()
	s := start(t, homeserver.Config{MatrixRTC: JSON{"transports": []JSON{{"type": "livekit", "livekit_service_url": "https://a.example"}}}})
	res := (&user{s.Anonymous(), s}).do(t, http.MethodGet, wellKnownPath, nil)
	require.Equal(t, http.StatusNotFound, res.Code)
	require.Equal(t, "M_UNRECOGNIZED", res.Get("errcode").Str)
}

func TestBadTransports(t *testing.T) {
	t.Parallel()
	for section, says := range map[string]string{
		"5":                  `"matrix_rtc": 5 (must be a section`,
		"{transport: []}":    `unknown config key "transport" (the keys there are transports)`,
		"{transports: {}}":   `transports": a section (must be a list of sections)`,
		"{transports: [5]}":  `"transports": 5 (must be a section`,
		"{transports: [{}]}": `"matrix_rtc.transports[0].type"`,
		"{transports: [{type: livekit, url: x}]}":                                                    `unknown config key "url" (the keys there are type, livekit_service_url)`,
		"{transports: [{type: livekit, livekit_service_url: [x]}]}":                                  `livekit_service_url": a list (must be text)`,
		"{transports: [{type: jitsi, livekit_service_url: 'https://a.example'}]}":                    `"matrix_rtc.transports[0].type": "jitsi" (must be livekit)`,
		"{transports: [{type: livekit, livekit_service_url: 'https://a.example'}, {type: livekit}]}": `"matrix_rtc.transports[1].livekit_service_url": ""`,
		"{transports: [{type: livekit, livekit_service_url: a.example/jwt}]}":                        `"matrix_rtc.transports[0].livekit_service_url": "a.example/jwt"`,
		"{transports: [{type: livekit, livekit_service_url: 'wss://a.example'}]}":                    `"matrix_rtc.transports[0].livekit_service_url": "wss://a.example"`,
		"{transports: [{type: livekit, livekit_service_url: 'https:///jwt'}]}":                       `"matrix_rtc.transports[0].livekit_service_url": "https:///jwt"`,
		"{transports: [{type: livekit, livekit_service_url: 'https://user:secret@a.example'}]}":      `"matrix_rtc.transports[0].livekit_service_url"`,
		"{transports: [{type: livekit, livekit_service_url: 'https://a.example?x'}]}":                `"matrix_rtc.transports[0].livekit_service_url": "https://a.example?x"`,
		"{transports: [{type: livekit, livekit_service_url: 'https://a.example/#x'}]}":               `"matrix_rtc.transports[0].livekit_service_url": "https://a.example/#x"`,
		"{transports: [{type: livekit, livekit_service_url: 'https://a.example:port'}]}":             `"matrix_rtc.transports[0].livekit_service_url": "https://a.example:port"`,
	} {
		t.Run(section, func(t *testing.T) {
			hs, err := homeserver.New(binary, t.TempDir(), homeserver.Config{})
			require.NoError(t, err)
			name := filepath.Join(hs.Dir, "dendrite.yaml")
			config, err := os.ReadFile(name)
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(name, append(config, []byte("\nmatrix_rtc: "+section+"\n")...), 0o600))
			requireFails(t, says, "--config", name, "--really-enable-open-registration", "--http-bind-address", "127.0.0.1:0")
		})
	}
}
