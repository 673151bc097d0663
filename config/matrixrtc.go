package config

import (
	"fmt"

	"github.com/matrix-org/dendrite/setup/config"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc"
)

// MatrixRTC is the section matrix_rtc of dendrite.yaml. It has LiveKit or Transports, or neither.
type MatrixRTC struct {
	// LiveKit is the SFU for which this server makes the tokens itself. Default: none.
	LiveKit *LiveKit `yaml:"livekit"`
	// Transports are the transports that clients are told to use for calls, the best first, if another service makes their tokens. Default:
	// none.
	Transports []rtc.Transport `yaml:"transports"`
}

// verify adds an error to configErrs for each value that is not allowed. The error names the key.
func (m *MatrixRTC) verify(delayed *DelayedEvents, configErrs *config.ConfigErrors) {
	if m.LiveKit != nil {
		m.LiveKit.verify(delayed, configErrs)
		if len(m.Transports) > 0 {
			configErrs.Add(`config keys "matrix_rtc.livekit" and "matrix_rtc.transports": only one of them can be used, because the transport ` +
				"of livekit is derived from it")
		}
	}
	for i, transport := range m.Transports {
		check := func(ok bool, key, value, allowed string) {
			if !ok {
				configErrs.Add(fmt.Sprintf("invalid value for config key %q: %q (must be %s)",
					fmt.Sprintf("matrix_rtc.transports[%d].%s", i, key), value, allowed))
			}
		}
		check(transport.Type == rtc.TypeLiveKit, "type", transport.Type, rtc.TypeLiveKit)
		check(isURL(transport.LiveKitServiceURL, "https", "http"), "livekit_service_url", transport.LiveKitServiceURL,
			"a URL such as https://rtc.example.com/livekit/jwt")
	}
}

// announced returns the transports that clients are told about.
func (m *MatrixRTC) announced() []rtc.Transport {
	if m.LiveKit != nil {
		return []rtc.Transport{{Type: rtc.TypeLiveKit, LiveKitServiceURL: m.LiveKit.ServiceURL, URL: m.LiveKit.URL}}
	}
	return m.Transports
}

// tokens returns the configuration of the tokens that this server makes itself, or nil.
func (m *MatrixRTC) tokens(users, servers expiration.RateLimit, realIPHeader string) *rtc.TokenConfig {
	l := m.LiveKit
	if l == nil {
		return nil
	}
	return &rtc.TokenConfig{
		URL: l.URL, ServicePath: l.ServicePath, FullAccessServers: l.FullAccessServers,
		UserRequests: users, ServerRequests: servers, RealIPHeader: realIPHeader,
	}
}
