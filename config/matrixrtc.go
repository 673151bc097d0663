package config

import (
	"fmt"
	"net/url"

	"github.com/matrix-org/dendrite/setup/config"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc"
)

// MatrixRTC is the section matrix_rtc of dendrite.yaml.
type MatrixRTC struct {
	// Transports are the transports that clients are told to use for calls, the best first. Default: none.
	Transports []rtc.Transport `yaml:"transports"`
}

// Verify adds an error to configErrs for each value that is not allowed. The error names the key.
func (m *MatrixRTC) Verify(configErrs *config.ConfigErrors) {
	for i, transport := range m.Transports {
		check := func(ok bool, key, value, allowed string) {
			if !ok {
				configErrs.Add(fmt.Sprintf("invalid value for config key %q: %q (must be %s)",
					fmt.Sprintf("matrix_rtc.transports[%d].%s", i, key), value, allowed))
			}
		}
		check(transport.Type == "livekit", "type", transport.Type, "livekit")
		check(isBaseURL(transport.LiveKitServiceURL), "livekit_service_url", transport.LiveKitServiceURL,
			"a URL such as https://rtc.example.com/livekit/jwt")
	}
}

// isBaseURL reports whether clients can append a path to a URL and call it.
func isBaseURL(text string) bool {
	u, err := url.Parse(text)
	return err == nil && (u.Scheme == "https" || u.Scheme == "http") && u.Hostname() != "" && u.User == nil &&
		u.RawQuery == "" && !u.ForceQuery && u.Fragment == ""
}
