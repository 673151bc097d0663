package config

import (
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/gomatrixserverlib/spec"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

const (
	// defaultServicePath is where the service's API is, unless service_path says otherwise. It is below the client API, because every reverse
	// proxy hands that on already.
	defaultServicePath = "/_matrix/client/unstable/io.element.msc4195/livekit"
	// minSecret is the length of LiveKit's secret, at least, in bytes. It signs with HS256, whose key must be as long as its hash (RFC 7518,
	// section 3.2).
	minSecret = 32
	// minMaxDelay is what max_delay must be at least. A client whose leave event is handed over to the server schedules it with this delay.
	minMaxDelay = time.Hour
	// maxFullAccess is how many servers may have full access.
	maxFullAccess = 100
	// placeholder is how the keys and secrets in our documents begin.
	placeholder = "change-me"
)

// LiveKit is the section matrix_rtc.livekit: the SFU for which this server makes the tokens itself. Load fills in what is derived and what
// is in files.
type LiveKit struct {
	// URL is where clients reach LiveKit's WebSocket, without a slash at its end. Required.
	URL string `yaml:"url"`
	// APIURL is where this server reaches LiveKit's API. Default: URL, with https for wss and http for ws.
	APIURL string `yaml:"api_url"`
	// APIKey is a key of livekit.yaml, and APISecret is its secret, of 32 bytes at least. In place of each of them there can be a file whose
	// first line it is. Required.
	APIKey        string         `yaml:"api_key"`
	APIKeyFile    string         `yaml:"api_key_file"`
	APISecret     livekit.Secret `yaml:"api_secret"`
	APISecretFile string         `yaml:"api_secret_file"`
	// ServicePath is where this server serves the API of lk-jwt-service, which clients need that cannot yet get tokens otherwise. Default:
	// defaultServicePath.
	ServicePath string `yaml:"service_path"`
	// ServiceURL is the URL of ServicePath for clients. Default: global.well_known_client_name with ServicePath.
	ServiceURL string `yaml:"service_url"`
	// FullAccessServers are the servers whose users may publish, and for whose users rooms are made in LiveKit. Default: this server.
	FullAccessServers []string `yaml:"full_access_servers"`
}

// servicePath is what a path for service_path looks like. matrixPath is what the paths look like that belong to Matrix, now or later.
var (
	servicePath = regexp.MustCompile(`^/_matrix/client(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+$`)
	matrixPath  = regexp.MustCompile(`^/_matrix/client/([rv][0-9]+|versions|unstable)(/|$)`)
)

// verify adds an error to configErrs for each value that is not allowed, except for the key and the secret, which resolve checks.
func (l *LiveKit) verify(delayed *DelayedEvents, configErrs *config.ConfigErrors) {
	check := func(ok bool, key string, value any, allowed string) {
		if !ok {
			configErrs.Add(fmt.Sprintf("invalid value for config key %q: %q (must be %s)", "matrix_rtc.livekit."+key, value, allowed))
		}
	}
	check(isURL(l.URL, "wss", "ws"), "url", l.URL, "a URL such as wss://rtc.example.com/livekit/sfu")
	check(l.APIURL == "" || isURL(l.APIURL, "https", "http"), "api_url", l.APIURL, "a URL such as http://127.0.0.1:7880")
	check(l.ServicePath == "" || l.ServicePath == defaultServicePath ||
		servicePath.MatchString(l.ServicePath) && !matrixPath.MatchString(l.ServicePath), "service_path", l.ServicePath,
		"a path that Matrix does not use, such as /_matrix/client/livekit")
	check(l.ServiceURL == "" || isURL(l.ServiceURL, "https", "http"), "service_url", l.ServiceURL,
		"a URL such as https://matrix.example.com"+defaultServicePath)
	check(len(l.FullAccessServers) <= maxFullAccess, "full_access_servers", fmt.Sprintf("%d servers", len(l.FullAccessServers)),
		fmt.Sprintf("at most %d servers", maxFullAccess))
	for i, server := range l.FullAccessServers {
		_, _, ok := spec.ParseAndValidateServerName(spec.ServerName(server))
		check(ok, fmt.Sprintf("full_access_servers[%d]", i), server, "a server name such as example.com")
	}
	if delayed.MaxScheduledPerUser == 0 {
		configErrs.Add(`invalid value for config key "expiration.delayed_events.max_scheduled_per_user": 0 ` +
			"(must be at least 1, because matrix_rtc.livekit needs delayed events)")
	}
	if time.Duration(delayed.MaxDelay) < minMaxDelay {
		configErrs.Add(fmt.Sprintf(`invalid value for config key "expiration.delayed_events.max_delay": %v `+
			"(must be at least 1h, because with matrix_rtc.livekit clients ask for a delay of an hour)", delayed.MaxDelay))
	}
}

// resolve reads and checks the key and the secret, and fills in what is derived from other keys. It adds an error to configErrs for each
// value that is not allowed. No error has a secret.
func (l *LiveKit) resolve(global *config.Global, configErrs *config.ConfigErrors) {
	l.APIKey = keyOrFile("api_key", l.APIKey, l.APIKeyFile, 1, configErrs)
	l.APISecret = livekit.Secret(keyOrFile("api_secret", string(l.APISecret), l.APISecretFile, minSecret, configErrs))
	l.URL = strings.TrimSuffix(l.URL, "/")
	if l.APIURL = strings.TrimSuffix(l.APIURL, "/"); l.APIURL == "" {
		l.APIURL = "http" + strings.TrimPrefix(l.URL, "ws") // ws becomes http, and wss https
	}
	if l.ServicePath == "" {
		l.ServicePath = defaultServicePath
	}
	if l.ServiceURL = strings.TrimSuffix(l.ServiceURL, "/"); l.ServiceURL == "" {
		l.ServiceURL = strings.TrimSuffix(global.WellKnownClientName, "/") + l.ServicePath
		if !isURL(global.WellKnownClientName, "https", "http") {
			configErrs.Add(fmt.Sprintf(`missing config key "matrix_rtc.livekit.service_url": it cannot be derived from `+
				`"global.well_known_client_name", which is %q`, global.WellKnownClientName))
		}
	}
	if len(l.FullAccessServers) == 0 {
		l.FullAccessServers = []string{string(global.ServerName)}
	}
}

// Insecure returns the URLs for clients that a browser refuses to call from a page of a secure site: those without TLS, unless they lead to
// the browser's own machine.
func (l *LiveKit) Insecure() (insecure []string) {
	for _, text := range []string{l.URL, l.ServiceURL} {
		u, err := url.Parse(text)
		if err != nil || u.Scheme == "wss" || u.Scheme == "https" || u.Hostname() == "localhost" {
			continue
		}
		if address, err := netip.ParseAddr(u.Hostname()); err != nil || !address.IsLoopback() {
			insecure = append(insecure, text)
		}
	}
	return insecure
}

// keyOrFile returns the value of a key of the section livekit, or the first line of the file that stands in its place. Exactly one of them
// must be given. The value must have at least this many bytes, and must not be a placeholder.
func keyOrFile(key, value, file string, least int, configErrs *config.ConfigErrors) string {
	key = "matrix_rtc.livekit." + key
	source := fmt.Sprintf("config key %q", key)
	if (value == "") == (file == "") {
		configErrs.Add(fmt.Sprintf("%s: either this key or %q must have a value", source, key+"_file"))
		return ""
	}
	if file != "" {
		var err error
		if value, err = firstLine(file); err != nil {
			configErrs.Add(fmt.Sprintf("config key %q: %v", key+"_file", err))
			return ""
		}
		source = fmt.Sprintf("config key %q, file %s", key+"_file", file)
	}
	switch {
	case strings.HasPrefix(value, placeholder):
		configErrs.Add(source + ": the value is still the placeholder of an example (must be the one in livekit.yaml)")
	case len(value) < least:
		configErrs.Add(fmt.Sprintf("%s: the value is too short (must have at least %d bytes)", source, least))
	}
	return value
}

// isURL reports whether a text is a URL with one of these schemes that can be continued with a path: it names a host, and has no user, query
// or fragment.
func isURL(text string, schemes ...string) bool {
	u, err := url.Parse(text)
	return err == nil && slices.Contains(schemes, u.Scheme) && u.Hostname() != "" && u.User == nil &&
		u.RawQuery == "" && !u.ForceQuery && u.Fragment == ""
}
