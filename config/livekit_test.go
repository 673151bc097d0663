package config

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/gomatrixserverlib/fclient"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc"
)

const goodSecret = "0123456789abcdef0123456789abcdef"

// loaded loads a file with the given sections. The server is example.com, and clients reach it at https://matrix.example.com.
func loaded(t *testing.T, text string) (*Config, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "dendrite.yaml")
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	var dendrite config.Dendrite
	dendrite.Global.SigningIdentity = fclient.SigningIdentity{ServerName: "example.com"}
	dendrite.Global.WellKnownClientName = "https://matrix.example.com"
	dendrite.RoomServer.Database.ConnectionString = "file:roomserver.db"
	return Load(file, &dendrite)
}

// liveKit returns the section livekit with some keys changed or, with the value "", left out.
func liveKit(changes map[string]string) string {
	keys := map[string]string{"url": "wss://rtc.example.com/sfu", "api_key": "key", "api_secret": goodSecret}
	text := "matrix_rtc:\n  livekit:\n"
	for key, value := range changes {
		keys[key] = value
	}
	for key, value := range keys {
		if value != "" {
			text += "    " + key + ": " + value + "\n"
		}
	}
	return text
}

// With the required keys, all others are derived.
func TestLiveKitDefaults(t *testing.T) {
	c, err := loaded(t, liveKit(nil))
	require.NoError(t, err)
	const serviceURL = "https://matrix.example.com/_matrix/client/unstable/io.element.msc4195/livekit"
	require.Equal(t, &LiveKit{
		URL: "wss://rtc.example.com/sfu", APIURL: "https://rtc.example.com/sfu", APIKey: "key", APISecret: goodSecret,
		ServicePath: "/_matrix/client/unstable/io.element.msc4195/livekit", ServiceURL: serviceURL,
		FullAccessServers: []string{"example.com"},
	}, c.MatrixRTC.LiveKit)
	_, _, calls := c.Components()
	require.Equal(t, []rtc.Transport{{Type: "livekit", LiveKitServiceURL: serviceURL, URL: "wss://rtc.example.com/sfu"}}, calls.Transports)

	c, err = loaded(t, liveKit(map[string]string{
		"url": "ws://localhost:7880/", "service_url": "http://localhost:8008/x/", "service_path": "/_matrix/client/livekit",
		"full_access_servers": "[example.com, 'b.example:8448', '[::1]:8448']",
	}))
	require.NoError(t, err)
	require.Equal(t, &LiveKit{
		URL: "ws://localhost:7880", APIURL: "http://localhost:7880", APIKey: "key", APISecret: goodSecret,
		ServicePath: "/_matrix/client/livekit", ServiceURL: "http://localhost:8008/x",
		FullAccessServers: []string{"example.com", "b.example:8448", "[::1]:8448"},
	}, c.MatrixRTC.LiveKit)

	c, err = loaded(t, liveKit(map[string]string{"api_url": "http://livekit:7880/", "service_path": "/_matrix/client/a.b/c_d"}))
	require.NoError(t, err)
	require.Equal(t, "http://livekit:7880", c.MatrixRTC.LiveKit.APIURL)
	require.Equal(t, "https://matrix.example.com/_matrix/client/a.b/c_d", c.MatrixRTC.LiveKit.ServiceURL)

	for _, text := range []string{"", "matrix_rtc:\n", "matrix_rtc: {livekit: }\n"} {
		c, err = loaded(t, text)
		require.NoError(t, err)
		require.Nil(t, c.MatrixRTC.LiveKit)
		_, _, calls = c.Components()
		require.Empty(t, calls.Transports)
	}
}

// Each error names its key.
func TestBadLiveKit(t *testing.T) {
	const placeholder = "change-me-change-me-change-me-change-me"
	for text, want := range map[string]string{
		"matrix_rtc: {livekit: {}}":                                `invalid value for config key "matrix_rtc.livekit.url": "" (must be a URL such as wss://`,
		"matrix_rtc: {livekit: 5}":                                 `line 1: invalid value for config key "livekit": 5 (must be a section with keys of its own)`,
		"matrix_rtc: {livekit: []}":                                `line 1: invalid value for config key "livekit": a list (must be a section with keys of its own)`,
		"livekit: {}":                                              `line 1: unknown config key "livekit" (did you mean "matrix_rtc.livekit"?)`,
		"live_kit: {}":                                             `line 1: unknown config key "live_kit" (did you mean "matrix_rtc.livekit"?)`,
		liveKit(map[string]string{"secret": "x"}):                  `unknown config key "secret" (the keys there are url, api_url, api_key, api_key_file, api_secret,`,
		liveKit(map[string]string{"api_secret": "[a]"}):            `invalid value for config key "api_secret": a list (must be text)`,
		liveKit(map[string]string{"full_access_servers": "a"}):     `invalid value for config key "full_access_servers": a (must be a list of texts)`,
		liveKit(map[string]string{"url": "https://a.example"}):     `"matrix_rtc.livekit.url": "https://a.example"`,
		liveKit(map[string]string{"url": "wss://"}):                `"matrix_rtc.livekit.url": "wss://"`,
		liveKit(map[string]string{"url": "wss://a.example?x=1"}):   `"matrix_rtc.livekit.url": "wss://a.example?x=1"`,
		liveKit(map[string]string{"url": "'wss://a.example#x'"}):   `"matrix_rtc.livekit.url": "wss://a.example#x"`,
		liveKit(map[string]string{"url": "wss://u@a.example"}):     `"matrix_rtc.livekit.url": "wss://u@a.example"`,
		liveKit(map[string]string{"api_url": "wss://a.example"}):   `"matrix_rtc.livekit.api_url": "wss://a.example"`,
		liveKit(map[string]string{"api_key": ""}):                  `config key "matrix_rtc.livekit.api_key": either this key or "matrix_rtc.livekit.api_key_file" must have a value`,
		liveKit(map[string]string{"api_secret_file": "/x"}):        `config key "matrix_rtc.livekit.api_secret": either this key or "matrix_rtc.livekit.api_secret_file" must have a value`,
		liveKit(map[string]string{"api_key": placeholder}):         `config key "matrix_rtc.livekit.api_key": the value is still the placeholder`,
		liveKit(map[string]string{"api_secret": placeholder}):      `config key "matrix_rtc.livekit.api_secret": the value is still the placeholder`,
		liveKit(map[string]string{"api_secret": goodSecret[1:]}):   `config key "matrix_rtc.livekit.api_secret": the value is too short (must have at least 32 bytes)`,
		liveKit(map[string]string{"service_url": "wss://a"}):       `"matrix_rtc.livekit.service_url": "wss://a"`,
		liveKit(map[string]string{"service_url": "a.example"}):     `"matrix_rtc.livekit.service_url": "a.example"`,
		liveKit(map[string]string{"full_access_servers": "[a/b]"}): `"matrix_rtc.livekit.full_access_servers[0]": "a/b" (must be a server name`,
		liveKit(map[string]string{"full_access_servers": "[" + strings.Repeat("a,", 101) + "]"}): `"matrix_rtc.livekit.full_access_servers": "101 servers" ` +
			`(must be at most 100 servers)`,

		liveKit(nil) + "  transports: [{type: livekit, livekit_service_url: 'https://a.example'}]": `config keys "matrix_rtc.livekit" and "matrix_rtc.transports": only one`,
		liveKit(nil) + "expiration: {delayed_events: {max_delay: 59m}}":                            `"expiration.delayed_events.max_delay": 59m0s (must be at least 1h`,
		liveKit(nil) + "expiration: {delayed_events: {max_scheduled_per_user: 0}}":                 `"expiration.delayed_events.max_scheduled_per_user": 0 (must be at least 1`,
	} {
		_, err := loaded(t, text)
		require.ErrorContains(t, err, want, text)
		require.NotContains(t, err.Error(), goodSecret[1:])
		require.NotContains(t, err.Error(), placeholder)
	}
	for _, text := range []string{
		liveKit(nil) + "expiration: {delayed_events: {max_delay: 1h, max_scheduled_per_user: 1}}",
		"matrix_rtc: {transports: [{type: livekit, livekit_service_url: 'https://a.example'}]}\nexpiration: {delayed_events: {max_delay: 1m}}",
	} {
		_, err := loaded(t, text)
		require.NoError(t, err, text)
	}
}

// The service's path must be one that neither Matrix nor Dendrite uses, and that a router takes literally.
func TestServicePath(t *testing.T) {
	for path, ok := range map[string]bool{
		defaultServicePath:          true,
		"/_matrix/client/livekit":   true,
		"/_matrix/client/a/b.c/~-_": true,

		defaultServicePath + "/x":       false,
		"/_matrix/client":               false,
		"/_matrix/client/":              false,
		"/_matrix/client/livekit/":      false,
		"/_matrix/rtc/livekit":          false,
		"/livekit":                      false,
		"/_matrix/client/v3/livekit":    false,
		"/_matrix/client/r0":            false,
		"/_matrix/client/v1/x":          false,
		"/_matrix/client/versions":      false,
		"/_matrix/client/unstable/x":    false,
		"/_matrix/client/a/../v3/login": false,
		"/_matrix/client/./v3":          false,
		"/_matrix/client//a":            false,
		"'/_matrix/client/{a}'":         false,
		"/_matrix/client/a%2Fb":         false,
		"'/_matrix/client/a?b'":         false,
		"'/_matrix/client/a b'":         false,
	} {
		_, err := loaded(t, liveKit(map[string]string{"service_path": path}))
		if ok {
			require.NoError(t, err, path)
		} else {
			require.ErrorContains(t, err, `"matrix_rtc.livekit.service_path"`, path)
		}
	}
}

// Without global.well_known_client_name the URL of the service cannot be derived.
func TestServiceURLIsNeeded(t *testing.T) {
	for base, ok := range map[string]bool{"": false, "https://": false, "https://a.example/": true, "http://127.0.0.1:8008": true} {
		l := &LiveKit{URL: "wss://a.example", APIKey: "key", APISecret: goodSecret}
		var errs config.ConfigErrors
		l.resolve(&config.Global{WellKnownClientName: base}, &errs)
		if ok {
			require.Empty(t, errs)
			require.Equal(t, strings.TrimSuffix(base, "/")+defaultServicePath, l.ServiceURL)
			continue
		}
		require.Equal(t, config.ConfigErrors{fmt.Sprintf(`missing config key "matrix_rtc.livekit.service_url": it cannot be derived from `+
			`"global.well_known_client_name", which is %q`, base)}, errs)
	}
}

// URLs without TLS are accepted, and named, unless they lead to the own machine.
func TestInsecureURLs(t *testing.T) {
	for url, insecure := range map[string]bool{
		"wss://a.example": false, "ws://a.example": true, "ws://192.0.2.1:7880/sfu": true, "ws://[2001:db8::1]": true,
		"ws://localhost:7880": false, "ws://127.0.0.1:7880": false, "ws://127.9.9.9": false, "ws://[::1]:7880": false,
	} {
		c, err := loaded(t, liveKit(map[string]string{"url": "'" + url + "'", "service_url": "'" + strings.Replace(url, "ws", "http", 1) + "'"}))
		require.NoError(t, err)
		if insecure {
			require.Equal(t, []string{url, strings.Replace(url, "ws", "http", 1)}, c.MatrixRTC.LiveKit.Insecure())
		} else {
			require.Empty(t, c.MatrixRTC.LiveKit.Insecure(), url)
		}
	}
}
