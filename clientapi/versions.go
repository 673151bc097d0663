package clientapi

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"

	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/util"
)

// AddVersions registers a route that answers /versions as Dendrite does, with more unstable features in it. It must be called
// before Dendrite registers its own.
func AddVersions(router *mux.Router, features ...string) {
	router.Handle("/versions", httputil.MakeExternalAPI("versions", func(req *http.Request) util.JSONResponse {
		answer := buffer{header: http.Header{}, code: http.StatusOK}
		router.ServeHTTP(&answer, req.WithContext(context.WithValue(req.Context(), toDendrite{}, true)))
		if answer.code != http.StatusOK {
			return util.JSONResponse{Code: answer.code, JSON: json.RawMessage(answer.body.Bytes())}
		}
		versions, err := advertise(answer.body.Bytes(), features)
		if err != nil {
			return util.ErrorResponse(err)
		}
		return util.JSONResponse{Code: http.StatusOK, JSON: versions}
	})).Methods(http.MethodGet).MatcherFunc(func(req *http.Request, _ *mux.RouteMatch) bool {
		return req.Context().Value(toDendrite{}) == nil
	})
}

// toDendrite marks the context of a request that our own route has had.
type toDendrite struct{}

// advertise adds features to an answer of /versions.
func advertise(answer []byte, features []string) (map[string]json.RawMessage, error) {
	var versions map[string]json.RawMessage
	if err := json.Unmarshal(answer, &versions); err != nil {
		return nil, err
	}
	all := map[string]bool{}
	if data := versions["unstable_features"]; data != nil {
		if err := json.Unmarshal(data, &all); err != nil {
			return nil, err
		}
	}
	for _, feature := range features {
		all[feature] = true
	}
	data, err := json.Marshal(all)
	versions["unstable_features"] = data
	return versions, err
}

// buffer keeps an answer.
type buffer struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

func (b *buffer) Header() http.Header         { return b.header }
func (b *buffer) WriteHeader(code int)        { b.code = code }
func (b *buffer) Write(p []byte) (int, error) { return b.body.Write(p) }
